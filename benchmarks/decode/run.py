"""A decode step on the GPUs of one host, every way to run it side by side on the same weights and routing.

    python -m benchmarks.decode.cases TRACES -o CASES
    torchrun --nproc-per-node 2 -m benchmarks.decode.run CASES [--only NAME]... [--batch N]... -o FILE.json

host-synced is the baseline (host_synced.py): eager, two all-to-alls whose sizes the host reads; with
DeepSpeed installed, its own layer stands beside it (deepspeed_moe.py). The others are captured:
dispatch-combine, coherent and replicated, each over NCCL with fixed capacity and over one-sided writes.
Sequences have --context tokens; their routing is replayed. The floor is what a step must move over what was
measured here: bytes read (touched experts, dense weights, keys and values; the mean over ranks) at the
bandwidth of a large copy, plus hidden states at the bandwidth of a large copy to the other GPU. Written as it
goes.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.decode.captured import STEPS, TRANSPORTS, captured_rows, exchange_us
from benchmarks.decode.case import PLACEMENTS, Case
from benchmarks.decode.host_synced import HostSyncedDecode
from benchmarks.decode.show import show, show_auto
from benchmarks.decode.timing import bandwidths, timed
from exflow.bench.job import WARM_UP
from exflow.bench.timing import StepTimes
from exflow.cost.auto import predictions
from exflow.cost.probe import measure
from exflow.cost.workload import Workload
from exflow.files import atomic_path
from exflow.job.cluster import Cluster, join_cluster
from exflow.placement.time.machine import Machine

STRATEGIES = ("dispatch-combine", "coherent", "replicated")


def baseline_row(
    name: str,
    kind: type[HostSyncedDecode],
    case: Case,
    cluster: Cluster,
    placement: str,
    batch: int,
    context: int,
) -> dict[str, Any]:
    decode = kind(
        case.decoder, case.tables[placement], cluster.rank, cluster.num_ranks, batch, context, STEPS + WARM_UP
    )
    for _ in range(WARM_UP):
        decode.advance()
    torch.cuda.synchronize()
    dist.barrier()
    times = StepTimes.of([timed(decode.advance, 1) for _ in range(STEPS)], cluster.num_ranks)
    return {
        "strategy": name,
        "transport": "eager",
        "placement": placement,
        **asdict(times),
        "tokens_per_s": batch / times.median_us * 1e6,
    }


def predicted_us(case: Case, batch: int, context: int, machines: list[Machine]) -> list[dict[str, Any]]:
    """Predicted microseconds of each strategy, as `auto` gets them, from the routing that the plan was made
    from."""
    return [
        {
            "transport": machine.transport,
            "placement": name,
            "step_us": {
                each.strategy: each.step_s * 1e6
                for each in predictions(Workload.of(case.config, plan, batch, context, 2), plan, machine)
            },
        }
        for machine in machines
        for name, plan in case.plans.items()
    ]


def rows_of(
    case: Case,
    cluster: Cluster,
    batch: int,
    context: int,
    hardware: dict[str, float],
    strategies: list[str],
) -> Iterator[dict[str, Any]]:
    for placement in PLACEMENTS:
        yield baseline_row("host-synced", HostSyncedDecode, case, cluster, placement, batch, context)
    if find_spec("deepspeed") is not None:
        from benchmarks.decode.deepspeed_moe import DeepSpeedDecode

        if DeepSpeedDecode.serves(case.decoder):
            yield baseline_row("deepspeed.moe", DeepSpeedDecode, case, cluster, "contiguous", batch, context)
    for strategy in strategies:
        for transport in TRANSPORTS:
            torch.cuda.empty_cache()
            yield from captured_rows(case, cluster, strategy, transport, batch, context, hardware)


def setting(cluster: Cluster, hardware: dict[str, float], context: int) -> dict[str, Any]:
    import triton

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{cluster.num_ranks} x {torch.cuda.get_device_name()}",
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "nccl": torch.cuda.nccl.version(),
        },
        "command": " ".join(["torchrun", "--nproc-per-node", str(cluster.num_ranks), *sys.argv]),
        "context": context,
        "steps": STEPS,
        **hardware,
    }


def run(arguments: argparse.Namespace, cluster: Cluster) -> None:
    hardware = bandwidths(cluster)
    machines = [measure(cluster, transport) for transport in TRANSPORTS]
    strategies = arguments.strategy or list(STRATEGIES)
    document = {**setting(cluster, hardware, arguments.context), "cases": []}
    document["machines"] = [asdict(machine) for machine in machines]
    for folder in sorted(arguments.cases.iterdir()):
        if arguments.only and folder.name not in arguments.only:
            continue
        case = Case.load(folder, cluster)
        for batch in arguments.batch:
            rows: list[dict[str, Any]] = []
            entry: dict[str, Any] = {"case": case.name, "batch": batch, "rows": rows}
            entry["predicted"] = predicted_us(case, batch, arguments.context, machines)
            document["cases"].append(entry)
            try:
                rows.extend(rows_of(case, cluster, batch, arguments.context, hardware, strategies))
                entry["exchange_us_a_layer"] = exchange_us(case, cluster, batch, arguments.context)
            except torch.OutOfMemoryError as error:
                entry["stopped"] = str(error).splitlines()[0]
            if cluster.rank == 0:
                show(case, batch, rows)
                if "stopped" not in entry:
                    show_auto(rows, entry["predicted"])
                print(entry.get("exchange_us_a_layer"), entry.get("stopped", ""), flush=True)
                with atomic_path(arguments.output) as path:
                    path.write_text(json.dumps(document, indent=1) + "\n")
        del case
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", type=Path, help="folder that decode/cases.py wrote")
    parser.add_argument("--only", action="append", help="a case; repeatable")
    parser.add_argument("--strategy", action="append", choices=STRATEGIES, help="by default all; repeatable")
    parser.add_argument("--batch", type=int, action="append", help="repeatable")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or [16, 64, 256, 512]
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast is not used
    with join_cluster("cuda") as cluster, torch.inference_mode():
        run(arguments, cluster)


if __name__ == "__main__":
    main()
