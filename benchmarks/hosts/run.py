"""Tokens per second on several hosts, by strategy, group size and placement, beside what the cost model says.

    python -m benchmarks.hosts.run TRACES [--hosts 2 4 8] [--shapes top1 gpt-oss deepseek] [-o FILE.json]

The hosts are network namespaces of this machine, joined by cables of --rate (network.py); root is needed. On
each runs one rank of a multi-node torchrun, over gloo. Models have random weights, few and narrow parts, and
the layers, the experts and the ratio of K/V width to hidden width of the model whose routing they replay.
TRACES is a folder of recorded routing (recorded.py). A trace is split by sequence: on three in four the
affinity placement is made, windows of the others are replayed. Each run is the same request: a batch of
sequences of --steps decode steps.

Placements by messages are made for coherence and run under every strategy. `time` and `time-replicas` are the
fastest plans that `exflow place --objective time` finds for dispatch-combine over these cables; they run
under dispatch-combine (group 1) alone. Seconds of experts are measured before, on idle cores. Where hosts
share cores, all wait for the sum of their work, which no plan changes, and only the network counts.

What links and ranks can do is measured first, in the same job; the model never sees the runs it is judged by.
Where the machine has fewer cores than the ranks have --threads, and one each for the network, what a rank
computes slows down the others: the measuring is done while all of them work.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.hosts.job import Job, own_cores, run_job
from benchmarks.hosts.judge import gains, judge
from benchmarks.hosts.network import NoNetwork, hosts
from benchmarks.hosts.plans import network_machine, placed_for, plans_of, serving_of, time_plans_of
from benchmarks.hosts.rates import NO_DIFFERENCE, expert_rates
from benchmarks.hosts.shapes import SHAPES, replayed, split
from benchmarks.routing.machine import cpu_model
from benchmarks.routing.recorded import NoTrace
from exflow.files import atomic_path


def strategies_of(ranks: int) -> list[str]:
    return [*(str(size) for size in range(1, ranks + 1) if ranks % size == 0), "replicated"]


def measure(name: str, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and judge one shape on `count` hosts."""
    parts = split(name, arguments.traces, arguments.steps + 1)
    trace = replayed(parts, arguments.batch * count)
    alone = own_cores(count, arguments.threads)
    slots = parts.config.num_experts // count
    rates = expert_rates(parts.config, arguments.threads, slots) if alone else NO_DIFFERENCE
    machine = network_machine(arguments.rate, arguments.delay, parts.config, rates)
    serving = serving_of(parts.config, machine, arguments.batch)
    plans = plans_of(parts.train, count) | time_plans_of(parts.train, count, serving)
    job = Job(
        arguments.batch * count,
        arguments.steps,
        arguments.repeats,
        arguments.seconds,
        arguments.strategies or strategies_of(count),
        list(plans),
        arguments.threads,
        alone,
    )
    with tempfile.TemporaryDirectory(prefix="exflow-hosts-") as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(parts.config.model_dump_json())
        trace.save(folder / "replayed")
        for placement, plan in plans.items():
            plan.save(folder / f"{placement}.json")
        with hosts(count, arguments.rate, arguments.delay) as network:
            run_job(network, folder, job)
        result = judge(job, folder, parts.config, trace)
    shape = {"shape": name, "hosts": count, "batch": job.batch, "steps": job.steps}
    widths = {"hidden": parts.config.hidden_size, "kv": parts.config.kv_width, "top_k": parts.config.top_k}
    expected = {"placed_for": placed_for(machine.machine, rates)}
    return shape | widths | expected | result | {"gains": gains(result["variants"])}


def show(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(
        f"\n{result['shape']}: {result['hosts']} hosts, batch {result['batch']}, hidden {result['hidden']}, "
        f"K/V {result['kv']}, top-{result['top_k']}; an exchange {machine['exchange_latency_ms']:.2f} ms + "
        f"bytes at {machine['megabytes_per_s_of_a_rank']:.0f} MB/s, a layer {machine['layer_ms']:.2f} ms + "
        f"{machine['token_us']:.1f} us a token"
    )
    print("group       placement      tokens/s  step ms  predicted  ratio  messages/rank  wire kB/rank  late")
    for each in result["variants"]:
        step = each["per_step"]
        messages = sum(step[name] for name in step if name.startswith(("dispatch_", "return_")))
        print(
            f"{each['strategy']:11} {each['placement']:13} {each['tokens_per_s']:9.1f} {each['step_ms']:8.1f}"
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
    """The date, hardware, versions and command that the figures depend on."""
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
