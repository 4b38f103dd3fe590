"""Compares placement methods by the predicted time of a decode step, on held-out tokens.

    python -m benchmarks.placement.by_time [--traces DIR] [--only NAME]... [--large] [-o FILE.json]
    python -m benchmarks.placement.time_table FILE.json    (the table as Markdown)

DIR holds recorded traces (recorded.py), split as in run.py; without it the cases made from them are left out.

Every plan is judged as an engine runs it: dispatch and combine, replicas by SGLang's static rule, 64 tokens a
GPU. `step_time` draws batches from the held-out quarter, on two machines: all GPUs in one node (h200), and
every GPU a node of its own (single-gpu-nodes). With --large, DeepSeek-V3's shape on 4 and 8 nodes of 8 GPUs
(h200, generated routing). Sizes are those of the model in configs/shapes.

Each method places without replicas and with an eighth more slots; more are added until all GPUs have equally
many. The ratio is to experts in order without replicas. Seconds are those of the call that makes the plan;
a search has 20.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.placement.cases import MANY, Family, cases, generated, progress, routing, v3_shape
from benchmarks.placement.methods import Case
from benchmarks.placement.results import existing, is_wanted, run_families, setting, show, store
from benchmarks.placement.time_methods import METHODS, Problem
from benchmarks.placement.time_table import TimeRow, table
from exflow.errors import InputError
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology, topology_of
from exflow.placement.time.machines import machine_named
from exflow.placement.time.serving import Serving
from exflow.placement.time.sizes import UNKNOWN, ModelSizes, sizes_of
from exflow.placement.traffic.step_time import step_time

TIME_LIMIT, BATCH = 20.0, 64
MODELS = {  # family -> name in configs/shapes
    "gpt-oss": "gpt-oss-20b",
    "deepseek-v2-lite": "deepseek-v2-lite",
    "mixtral": "mixtral-8x7b",
    "deepseek-v3-shape": "deepseek-v3",
}


@dataclass
class Results:
    """The rows found so far; written anew after each."""

    output: Path | None
    setting: dict[str, Any]
    rows: list[TimeRow] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        rows = [asdict(row) for row in self.rows]
        store(self.output, {**self.setting, "skipped": self.skipped, "rows": rows})


def families(traces: Path | None, large: bool) -> list[Family]:
    of, methods = partial(routing, traces, False), tuple(METHODS)
    found = [
        Family("gpt-oss", partial(of, "gpt-oss-20b", ("MMLU",)), both_ways(4, 8), methods),
        Family("deepseek-v2-lite", partial(of, "DeepSeek-V2-Lite"), both_ways(8, 16), methods),
        Family("mixtral", partial(of, "Mixtral-8x7B"), both_ways(4), methods),
    ]
    return [*found, Family("deepseek-v3-shape", v3_shape, MANY, methods)] if large else found


def both_ways(*numbers: int) -> tuple[Topology, ...]:
    """These numbers of GPUs, in one node and as nodes of one GPU each."""
    return tuple(topology_of(gpus, nodes) for gpus in numbers for nodes in (1, gpus))


def serving_of(topology: Topology, sizes: ModelSizes) -> Serving:
    """SGLang on the machine of this topology."""
    machine = machine_named("single-gpu-nodes" if topology.gpus_per_node == 1 else "h200")
    return Serving("sglang", Strategy.DISPATCH_COMBINE, machine, sizes, BATCH)


def rows_of(case: Case, sizes: ModelSizes, time_limit: float = TIME_LIMIT) -> Iterator[TimeRow]:
    """Yield the rows of a case: without replicas, then with an eighth more slots."""
    serving, base_us = serving_of(case.topology, sizes), None
    for redundant in (0, max(1, case.train.num_experts // 8)):
        for method in case.methods:
            progress.print(f"{case.name}: {method}, {redundant} redundant ...", end=" ")
            row = measure(method, Problem(case, serving, redundant, time_limit))
            progress.print(f"skipped: {row.skipped}" if row.time is None else f"{row.seconds:.2f} s")
            if row.time and base_us is None and method == "contiguous":
                base_us = row.time.step_us
            yield replace(row, ratio=row.time.step_us / base_us if row.time and base_us else None)


def measure(method: str, problem: Problem) -> TimeRow:
    """Place, and judge the plan on held-out tokens."""
    case, machine = problem.case, problem.serving.machine.name
    start = perf_counter()
    try:
        plan = METHODS[method](problem)
    except InputError as reason:
        return TimeRow(case.name, machine, method, problem.redundant, skipped=str(reason))
    seconds = perf_counter() - start
    time = step_time(plan, case.test, problem.serving)
    return TimeRow(case.name, machine, method, plan.num_slots - plan.num_experts, seconds, time)


def compile_all() -> None:
    """So that no method is charged for compiling what it calls first."""
    progress.print("compiling")
    tiny = Family("tiny", partial(generated, 1000, 3, 8, 2), both_ways(4), tuple(METHODS))
    for case in cases(tiny, lambda _: True):
        for _ in rows_of(case, UNKNOWN, time_limit=1.0):
            pass


def run_cases(family: Family, only: list[str] | None, results: Results) -> None:
    for case in cases(family, partial(is_wanted, only)):
        for row in rows_of(case, sizes_of(MODELS[family.name])):
            results.rows.append(row)
            results.write()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, metavar="DIR", help="recorded traces (.npz)")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="cases that have this in their name; repeatable"
    )
    parser.add_argument("--large", action="store_true", help="DeepSeek-V3's shape too, on 32 and 64 GPUs")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    traces = existing(given.traces, "cases")
    results = Results(given.output, setting("benchmarks.placement.by_time"))
    compile_all()
    run_families(
        families(traces, given.large),
        lambda family: run_cases(family, given.only, results),
        results.skipped,
        results.write,
    )
    show(table(results.rows) if results.rows else None, results.skipped)


if __name__ == "__main__":
    main()
