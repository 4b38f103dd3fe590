"""Tokens per second on several hosts, by strategy, group size and placement, beside what the cost model says.

    python -m benchmarks.hosts.run TRACES [--hosts 2 4 8] [--shapes top1 gpt-oss deepseek] [-o FILE.json]

The hosts are network namespaces of this machine, joined by cables of --rate (network.py); root is needed. On
each runs one rank of a multi-node torchrun, over gloo. Models have random weights, few and narrow parts, and
the layers, the experts and the ratio of K/V width to hidden width of the model whose routing they replay.
TRACES is a folder of recorded routing (recorded.py). A trace is split by sequence: on three in four the
affinity placement is made, windows of the others are replayed. Each run is the same request: a batch of
sequences of --steps decode steps.

What links and ranks can do is measured first, in the same job; the model never sees the runs it is judged by.
Where the machine has fewer cores than the ranks have --threads, and one each for the network, what a rank
computes slows down the others: the measuring is done while all of them work.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from benchmarks.hosts.network import CABLE, Host, NoNetwork, hosts
from benchmarks.routing.machine import cpu_model
from benchmarks.routing.recorded import NoTrace, joined, read
from exflow.cost.auto import step_traffic
from exflow.cost.machine import Link, Machine
from exflow.cost.predict import predict
from exflow.cost.workload import StepTraffic, Workload
from exflow.files import atomic_path
from exflow.model.config import ModelConfig
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.profiling.trace import RoutingTrace

# how each is made, and for how many slots there is a spare one, which holds a replica
PLACEMENTS = {"contiguous": ("contiguous", 0), "affinity": ("auto", 0), "replicas": ("auto", 8)}
PLACE_SECONDS = 20.0
PORT = "29500"


@dataclass(frozen=True)
class Shape:
    """Whose routing, and how wide: all domains of the model or these; of the choices so many, None for all.

    In the original K/V width over hidden width is 1024 / 2880 (gpt-oss) and 576 / 2048 (DeepSeek, whose
    context is a latent); `top1` is one narrow head.
    """

    model: str
    domains: tuple[str, ...]
    choices: int | None
    hidden: int
    head_dim: int


SHAPES = {
    "top1": Shape("gpt-oss-20b", ("MMLU",), 1, 2048, 32),
    "gpt-oss": Shape("gpt-oss-20b", ("MMLU",), None, 1440, 256),
    "deepseek": Shape("DeepSeek-V2-Lite", (), None, 1024, 144),
}


@dataclass(frozen=True)
class Split:
    """One shape's model and routing: to place by, and to replay, in windows of equal length."""

    config: ModelConfig
    train: RoutingTrace
    windows: np.ndarray[Any, np.dtype[Any]]  # [windows, length, layers, choices]


def split(name: str, folder: Path, length: int) -> Split:
    """Raises NoTrace if the folder lacks it."""
    shape = SHAPES[name]
    found = joined(read(folder, shape.model, shape.domains).values())
    experts, sequence = found.trace.experts[:, :, : shape.choices], found.trace.sequence
    config = ModelConfig(
        name=name,
        vocab_size=512,
        max_positions=length + 1,
        num_hidden_layers=experts.shape[1],
        hidden_size=shape.hidden,
        num_attention_heads=1,
        num_kv_heads=1,
        head_dim=shape.head_dim,
        intermediate_size=16,
        num_experts=found.trace.num_experts,
        top_k=experts.shape[2],
    )
    held_out = found.held_out
    train = RoutingTrace.from_arrays(
        experts[~held_out], num_experts=config.num_experts, sequence=sequence[~held_out], model=name
    )
    windows = [
        experts[rows[at : at + length]]
        for rows in (np.flatnonzero(sequence == each) for each in np.unique(sequence[held_out]))
        for at in range(0, len(rows) - length + 1, length)
    ]
    return Split(config, train, np.random.default_rng(0).permutation(np.stack(windows)))


def replayed(parts: Split, batch: int) -> RoutingTrace:
    """The routing of a batch: a window for each sequence, from the beginning again if there are too few."""
    chosen = parts.windows[np.arange(batch) % len(parts.windows)]
    sequences, length = chosen.shape[:2]
    return RoutingTrace.from_arrays(
        chosen.reshape(-1, *chosen.shape[2:]),
        num_experts=parts.config.num_experts,
        sequence=np.arange(sequences).repeat(length),
        model=parts.config.name,
    )


@dataclass(frozen=True)
class Job:
    """What the ranks are told."""

    batch: int
    steps: int
    repeats: int
    seconds: float
    strategies: list[str]  # replicated, or the ranks of a coherence group
    placements: list[str]
    threads: int  # of a rank


def run_job(network: list[Host], folder: Path, job: Job) -> None:
    """Run rank.py on every host. Raises RuntimeError if a rank fails or takes far too long."""
    (folder / "job.json").write_text(json.dumps(vars(job)))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": str(job.threads)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(network))]
    torchrun += ["--nproc-per-node", "1", "--rdzv-backend", "static"]
    torchrun += ["--master-addr", network[0].address, "--master-port", PORT]
    program = [str(Path(__file__).with_name("rank.py")), str(folder)]
    with (folder / "errors.txt").open("w") as errors:
        agents = [
            subprocess.Popen(
                host.command(*torchrun, "--node-rank", str(number), *program),
                env=environment,
                stdout=errors,
                stderr=errors,
            )
            for number, host in enumerate(network)
        ]
        try:
            give_up = time.monotonic() + 2 * job.seconds + 240
            codes = [agent.wait(max(1.0, give_up - time.monotonic())) for agent in agents]
        finally:
            for agent in agents:
                agent.terminate()  # torchrun ends its rank, too
            for agent in agents:
                agent.wait(60)
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}:\n{(folder / 'errors.txt').read_text()[-4000:]}")


def judge(job: Job, folder: Path, config: ModelConfig, trace: RoutingTrace) -> dict[str, Any]:
    """What was measured and what the model says of it, variant by variant."""
    stored = json.loads((folder / "machine.json").read_text())
    links = {name: Link(**stored.pop(name)) for name in ("inside", "between")}
    machine = Machine(**links, **stored)
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    decoded = trace.select(trace.position > 0)  # the first token of each is its prompt
    variants = []
    for placement in job.placements:
        plan = Plan.load(folder / f"{placement}.json")
        load = Workload.of(config, plan, job.batch, job.steps // 2, 4)
        for strategy in job.strategies:
            mine = [run for run in runs if (run["strategy"], run["placement"]) == (strategy, placement)]
            if mine:
                moved = moved_of(strategy, plan, decoded)
                variants.append(
                    describe(strategy, placement, mine, job) | predicted(strategy, load, moved, machine, job)
                )
                check_counters(variants[-1], mine[0]["counters"], moved, decoded)
    return {"machine": machine_figures(machine), "variants": variants}


def moved_of(strategy: str, plan: Plan, decoded: RoutingTrace) -> StepTraffic:
    if strategy != "replicated":
        return step_traffic(plan, decoded, int(strategy))
    return StepTraffic(1, 0, (0, 0), (0, 0), (0, 0), 1, 1, all_reduces=plan.num_layers)


def describe(strategy: str, placement: str, runs: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    counters, seconds = runs[0]["counters"], [run["step_s"] for run in runs]
    return {
        "strategy": strategy,
        "placement": placement,
        "tokens_per_s": job.batch / statistics.median(seconds),
        "step_ms": 1000 * statistics.median(seconds),
        "step_ms_of_runs": [1000 * each for each in seconds],
        "per_step": {name: value / job.steps for name, value in counters.items()},
    }


def predicted(
    strategy: str, load: Workload, moved: StepTraffic, machine: Machine, job: Job
) -> dict[str, Any]:
    prediction = predict(strategy, load, moved, machine)
    return {
        "predicted_ms": 1000 * prediction.step_s,
        "predicted_parts_ms": {
            "exchanges": 1000 * prediction.exchange_s,
            "compute": 1000 * prediction.compute_s,
            "background": 1000 * prediction.background_s,
        },
        "busiest": moved.expert_imbalance,
        "attending": moved.attention_imbalance,
    }


def check_counters(
    variant: dict[str, Any], counters: dict[str, Any], moved: StepTraffic, decoded: RoutingTrace
) -> None:
    """The ranks must have sent just what placement counts."""
    messages = round(sum(moved.dispatch + moved.combine) * decoded.num_tokens * decoded.num_layers)
    counted = sum(counters[name] for name in counters if name.startswith(("dispatch_", "return_")))
    if counted != messages:
        raise RuntimeError(
            f"{variant['strategy']}: the ranks sent {counted} messages, {messages} are predicted"
        )


def machine_figures(machine: Machine) -> dict[str, float | bool]:
    return {
        "exchange_latency_ms": 1000 * machine.between.latency_s,
        "megabytes_per_s_of_a_rank": machine.between.bytes_per_s / 1e6,
        "layer_ms": 1000 * machine.layer_s,
        "token_us": 1e6 * machine.token_s,
        "shared": machine.shared,
    }


def strategies_of(ranks: int) -> list[str]:
    return [*(str(size) for size in range(1, ranks + 1) if ranks % size == 0), "replicated"]


def plans_of(trace: RoutingTrace, count: int) -> dict[str, Plan]:
    """By placement. All wait for the rank that serves most, and for the one that owns most: a unit of
    imbalance costs as much time as all messages do."""
    topology = Topology(num_nodes=count, gpus_per_node=1)
    baseline = step_traffic(place(trace, topology, solving=Solving("contiguous")), trace, count)
    messages = sum(baseline.dispatch + baseline.combine)
    objective = Objective(balance_price=messages, owner_price=messages)
    return {
        name: place(
            trace,
            topology,
            objective=objective,
            solving=Solving(method, time_limit=PLACE_SECONDS),
            redundant_experts=trace.num_experts // each if each else 0,
        )
        for name, (method, each) in PLACEMENTS.items()
    }


def measure(name: str, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One shape on so many hosts."""
    parts = split(name, arguments.traces, arguments.steps + 1)
    trace = replayed(parts, arguments.batch * count)
    job = Job(
        arguments.batch * count,
        arguments.steps,
        arguments.repeats,
        arguments.seconds,
        arguments.strategies or strategies_of(count),
        list(PLACEMENTS),
        arguments.threads,
    )
    with tempfile.TemporaryDirectory(prefix="exflow-hosts-") as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(parts.config.model_dump_json())
        trace.save(folder / "replayed")
        for placement, plan in plans_of(parts.train, count).items():
            plan.save(folder / f"{placement}.json")
        with hosts(count, arguments.rate, arguments.delay) as network:
            run_job(network, folder, job)
        result = judge(job, folder, parts.config, trace)
    shape = {"shape": name, "hosts": count, "batch": job.batch, "steps": job.steps}
    widths = {"hidden": parts.config.hidden_size, "kv": parts.config.kv_width, "top_k": parts.config.top_k}
    return shape | widths | result | {"gains": gains(result["variants"])}


def gains(variants: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By placement: what the model picks there, over dispatch-combine with contiguous placement."""
    placed = {name: [each for each in variants if each["placement"] == name] for name in PLACEMENTS}
    baseline = next((each for each in placed["contiguous"] if each["strategy"] == "1"), None)
    if baseline is None:
        return {}
    return {name: gain(baseline, mine) for name, mine in placed.items() if mine}


def gain(baseline: dict[str, Any], variants: list[dict[str, Any]]) -> dict[str, Any]:
    picked, best = (min(variants, key=lambda each: each[of]) for of in ("predicted_ms", "step_ms"))
    return {
        "picked": picked["strategy"],
        "gain": baseline["step_ms"] / picked["step_ms"],
        "predicted_gain": baseline["predicted_ms"] / picked["predicted_ms"],
        "fastest": best["strategy"],
        "gain_of_fastest": baseline["step_ms"] / best["step_ms"],
    }


def show(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(
        f"\n{result['shape']}: {result['hosts']} hosts, batch {result['batch']}, hidden {result['hidden']}, "
        f"K/V {result['kv']}, top-{result['top_k']}; an exchange {machine['exchange_latency_ms']:.2f} ms + "
        f"bytes at {machine['megabytes_per_s_of_a_rank']:.0f} MB/s, a layer {machine['layer_ms']:.2f} ms + "
        f"{machine['token_us']:.1f} us a token"
    )
    print("group       placement   tokens/s  step ms  predicted  ratio  messages/rank  wire kB/rank  late")
    for each in result["variants"]:
        step = each["per_step"]
        messages = sum(step[name] for name in step if name.startswith(("dispatch_", "return_")))
        print(
            f"{each['strategy']:11} {each['placement']:10} {each['tokens_per_s']:9.1f} {each['step_ms']:8.1f}"
            f"{each['predicted_ms']:11.1f} {each['step_ms'] / each['predicted_ms']:6.2f} "
            f"{messages / result['hosts']:14.0f} {step['wire_bytes'] / result['hosts'] / 1000:13.0f} "
            f"{step['late']:5.1f}"
        )
    for placement, found in result["gains"].items():
        print(
            f"{placement}: the model picks {found['picked']}, {found['gain']:.2f}x dispatch-combine with "
            f"contiguous placement ({found['predicted_gain']:.2f}x predicted); fastest is "
            f"{found['fastest']}, {found['gain_of_fastest']:.2f}x",
            flush=True,
        )


def setting() -> dict[str, Any]:
    """What the figures depend on."""
    shown = [Path(part).name if part.startswith("/") else part for part in sys.argv]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{cpu_model()}, {os.cpu_count()} cores for all hosts",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *shown]),
    }


def stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, help="folder of recorded routing")
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--strategies", nargs="+", help="ranks of a coherence group, or replicated")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--delay", help="one way, as 0.1ms; needs the kernel's netem")
    parser.add_argument("--batch", type=int, default=128, help="sequences for each host")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of each rank, on cores of its own (and one for the network) if there are",
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=240, help="of runs for each shape and number of hosts"
    )
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def results_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for count in arguments.hosts:
        for name in arguments.shapes:
            yield measure(name, count, arguments)


def main() -> None:
    arguments, results = parse(), []
    signal.signal(signal.SIGTERM, stop)
    try:
        for result in results_of(arguments):
            show(result)
            results.append(result)
            if arguments.output:
                with atomic_path(arguments.output) as path:
                    document = {
                        **setting(),
                        "rate": arguments.rate,
                        "delay": arguments.delay,
                        "results": results,
                    }
                    path.write_text(json.dumps(document, indent=1) + "\n")
    except (NoNetwork, NoTrace) as error:
        print(f"skipped: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
