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
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.decode.host_synced import HostSyncedDecode
from exflow.bench.timing import (
    WARM_UP,
    StepTimes,
    begin_synthetic_batch,
    decode_synthetic_batch,
    step_bytes,
    time_steps,
)
from exflow.comm.buffers import symmetric_memory, tensor_at
from exflow.comm.transport import Transport
from exflow.cost.auto import predictions
from exflow.cost.machine import Machine
from exflow.cost.probe import measure
from exflow.cost.workload import Workload
from exflow.files import atomic_path, read_json
from exflow.job.cluster import Cluster, join_cluster
from exflow.model.config import ModelConfig, validated
from exflow.model.decoder import Decoder
from exflow.model.random_weights import RandomWeights, random_decoder
from exflow.model.replay import ReplayedRouting
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.decode_step import DecodeStep
from exflow.runtime.deploy import default_plan
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.graph_runner import Capture, CapturedDecode

PLACEMENTS = ("contiguous", "affinity")
STRATEGIES = ("dispatch-combine", "coherent", "replicated")
TRANSPORTS: tuple[Transport, ...] = ("collective", "one-sided")
STEPS = 24
COPIED = 1 << 30  # bytes


@dataclass(frozen=True)
class Case:
    """A model with random weights, the routing it replays, and where its experts may live."""

    name: str
    config: ModelConfig
    decoder: Decoder
    plans: dict[str, Plan]
    tables: dict[str, PlanTables]

    @classmethod
    def load(cls, folder: Path, cluster: Cluster) -> "Case":
        path = folder / "config.json"
        config = validated(ModelConfig, read_json(path, "model configuration", "run decode_cases.py"), path)
        plans = {name: Plan.load(folder / f"{name}.json") for name in PLACEMENTS}
        # which expert a slot holds makes no difference to how long it takes: all placements share the weights
        held = [list(range(plans["contiguous"].slots_per_rank))] * len(config.moe_layer_ids)
        decoder = random_decoder(RandomWeights(config), cluster.device, torch.bfloat16, held)
        decoder.replay = ReplayedRouting.of(RoutingTrace.load(folder / "trace"), config, cluster.device)
        tables = {name: PlanTables.of(plan, cluster.device) for name, plan in plans.items()}
        return cls(folder.name, config, decoder, plans, tables)


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median microseconds of `run` on this GPU."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def bandwidths(cluster: Cluster) -> dict[str, float]:
    """GB/s of a copy on this GPU (read and written), and of one to the other GPU's memory."""
    here, there = torch.empty(2, COPIED, dtype=torch.uint8, device=cluster.device)
    here.random_()
    figures = {"copy_gb_s": 2 * COPIED / timed(lambda: there.copy_(here), 10) / 1e3}
    peer = symmetric_memory(cluster)(COPIED // 4)
    address = peer.bases[(cluster.rank + 1) % cluster.num_ranks]
    part = here[: COPIED // 4]
    target = tensor_at(address, part)
    figures["link_gb_s"] = len(part) / timed(lambda: target.copy_(part), 10) / 1e3
    return figures


class ExchangeOnly(DecodeStep):
    """Gates, puts and takes in what came, layer after layer, without attention and experts."""

    def run(self) -> Iterator[None]:
        for block in self.decoder.blocks:
            yield from self._dispatch(block.mlp)
        self.state.progress.step += 1


def captured_rows(
    case: Case,
    cluster: Cluster,
    strategy: str,
    transport: Transport,
    batch: int,
    context: int,
    hardware: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """The figures of one way to run the step, for each placement."""
    group = 1 if strategy == "dispatch-combine" else cluster.num_ranks
    capture = Capture(
        case.decoder, case.tables["contiguous"], cluster, group, strategy == "replicated", transport
    )
    captured = decode_synthetic_batch(capture, batch, context, len(PLACEMENTS) * (STEPS + WARM_UP + 1))
    for placement in PLACEMENTS:
        captured.use_tables(case.tables[placement])
        begin_synthetic_batch(captured, batch, context)
        times = time_steps(captured, STEPS)
        moved = step_bytes(captured, STEPS + WARM_UP)
        floor = moved.floor_us(hardware["copy_gb_s"], hardware["link_gb_s"])
        yield {
            "strategy": strategy,
            "transport": transport,
            "placement": placement,
            **asdict(times),
            "tokens_per_s": batch / times.median_us * 1e6,
            **asdict(moved),
            "floor_us": floor,
            "times_floor": times.median_us / floor,
            "kernels_us": kernel_times(captured),
            "capture_s": captured.capture_s,
        }


def kernel_times(captured: CapturedDecode) -> dict[str, float]:
    """Microseconds that a step spends in each kernel on this rank, by the profiler: from the end of the
    kernel before to its own end, so that they add up to the step. `receive_kernel` and `combine_kernel`
    contain waiting."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        captured.advance()
        torch.cuda.synchronize()
    ran = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spent: dict[str, float] = {}
    reached = min(event.time_range.start for event in ran)
    for event in sorted(ran, key=lambda event: event.time_range.end):
        name = event.name[:48]
        spent[name] = spent.get(name, 0.0) + event.time_range.end - reached
        reached = event.time_range.end
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:12])


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


def exchange_us(case: Case, cluster: Cluster, batch: int, context: int) -> dict[str, float]:
    """Microseconds that an exchange of a layer takes, by leaving it out.

    Gate, exchange and receipt, less gate and receipt of as many sequences by a rank that is alone.
    """
    layers = len(case.config.moe_layer_ids)
    alone = Cluster(0, 1, 1, cluster.device)
    one = PlanTables.of(default_plan(case.config, Topology(gpus_per_node=1)), cluster.device)
    lonely = Capture(case.decoder, one, alone, 1, False, "one-sided")
    captured = decode_synthetic_batch(
        lonely, batch // cluster.num_ranks, context, STEPS + WARM_UP, ExchangeOnly
    )
    figures = {"none": time_steps(captured, STEPS).median_us / layers}
    for transport in TRANSPORTS:
        capture = Capture(
            case.decoder, case.tables["contiguous"], cluster, cluster.num_ranks, False, transport
        )
        captured = decode_synthetic_batch(capture, batch, context, STEPS + WARM_UP, ExchangeOnly)
        figures[transport] = time_steps(captured, STEPS).median_us / layers - figures["none"]
    return figures


def predicted_us(case: Case, batch: int, context: int, machines: list[Machine]) -> list[dict[str, Any]]:
    """What `auto` thinks that each strategy takes, by what the plan knows of the routing it was made from."""
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


def show(case: Case, batch: int, rows: list[dict[str, Any]]) -> None:
    """Ratios are to the host-synced baseline and to captured collectives, both with contiguous placement."""
    base = {
        (row["strategy"], row["transport"]): row["median_us"]
        for row in rows
        if row["placement"] == "contiguous"
    }
    print(f"\n{case.name}, batch {batch}")
    print(
        "strategy          transport   placement    step us     p99   tokens/s  x floor"
        "  x host-synced  x two NCCL"
    )
    for row in rows:
        ratios = [
            f"{base[baseline] / row['median_us']:10.2f}" if baseline in base else "         -"
            for baseline in (("host-synced", "eager"), ("dispatch-combine", "collective"))
        ]
        print(
            f"{row['strategy']:17} {row['transport']:11} {row['placement']:10} {row['median_us']:9.0f} "
            f"{row['p99_us']:7.0f} {row['tokens_per_s']:10.0f} {row.get('times_floor', 0):8.2f} "
            + "   ".join(ratios),
            flush=True,
        )


def show_auto(rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> None:
    """What `auto` would take with each transport and placement, and how much longer that is than the best."""
    taken = {(row["strategy"], row["transport"], row["placement"]): row["median_us"] for row in rows}
    for each in predicted:
        here = {
            name: taken[name, each["transport"], each["placement"]]
            for name in each["step_us"]
            if (name, each["transport"], each["placement"]) in taken
        }
        chosen = min(here, key=each["step_us"].__getitem__)
        print(
            f"auto, {each['transport']}, {each['placement']}: {chosen}, predicted "
            f"{each['step_us'][chosen]:.0f} us, x best {here[chosen] / min(here.values()):.3f}"
        )


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
    parser.add_argument("cases", type=Path, help="folder that decode_cases.py wrote")
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
