"""What placement gains, by method, side by side: real and generated routing, judged on held-out tokens.

    python -m benchmarks.placement.run [--traces DIR] [--as-recorded] [--only NAME]... [--large] [--no-ilp]
                                   [-o FILE.json]

DIR holds recorded traces (recorded.py); without it the problems made from them are left out. Left out of the
traces is what their sequences have in common, as in the study: turns that a later turn holds again, a prompt
that all begin with, and sequences that loop. With these, test tokens repeat what the methods have seen, or
one another. `--as-recorded` keeps them, to compare with figures of others on the same files. Every fourth
sequence is for testing, or, as recorded, every fourth group of them; the methods see the rest.

A plan is made once and judged under two strategies, in messages per token and layer: with coherence, and with
dispatch and combine, as engines do today. All plans are made for coherence, except by the method that names
dispatch-combine. The table's ratios, of test tokens, are to the contiguous placement under the same strategy.

Seconds are those of the call that makes the plan, from counts made before: for our own methods that includes
the evaluation on the training tokens, which is most of what the contiguous placement takes. Compiling is done
before. The cold integer program has the paper's objective, pairs of adjacent layers and of a layer without a
price on imbalance, and begins from the contiguous placement; its time limit does not count writing it down.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.placement.cases import Family, cases, families, generated, progress
from benchmarks.placement.methods import METHODS, Case, SkippedError
from benchmarks.placement.results import existing, is_wanted, run_families, setting, show, store
from benchmarks.placement.table import Messages, Row, table
from benchmarks.routing.generated import generate
from exflow.errors import InputError
from exflow.placement.counts.affinity import count_affinity
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import topology_of
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.trace import RoutingTrace


@dataclass(frozen=True)
class Speed:
    """How fast something is: of three runs after one that does not count."""

    name: str
    load: str
    best_seconds: float
    median_seconds: float
    token_layers_per_second: float


@dataclass
class Results:
    """What the run has found so far; written anew after each thing found."""

    output: Path | None
    setting: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        document = {
            **self.setting,
            "skipped": self.skipped,
            "speeds": [asdict(speed) for speed in self.speeds],
            "rows": [asdict(row) for row in self.rows],
        }
        store(self.output, document)


def measure(case: Case, method: str) -> Row:
    start = time.perf_counter()
    try:
        plan = METHODS[method](case)
    except (SkippedError, InputError) as reason:
        return Row(case.name, method, skipped=str(reason))
    seconds = time.perf_counter() - start
    train, test = plan.expected or evaluate(plan, case.train), evaluate(plan, case.test)
    return Row(
        case.name,
        method,
        seconds,
        messages(train, test, "coherent"),
        messages(train, test, "dispatch_combine"),
        test["imbalance"]["mean"],
        gap(plan),
        plan.optimal,
        plan.method,
    )


def messages(train: dict[str, Any], test: dict[str, Any], strategy: str) -> Messages:
    seen, unseen = (figures["strategies"][strategy] for figures in (train, test))
    between = [each["inter_node"] if train["nodes"] > 1 else None for each in (seen, unseen)]
    return Messages(seen["messages_per_token_layer"], unseen["messages_per_token_layer"], *between)


def gap(plan: Plan) -> float | None:
    if plan.objective is None or plan.lower_bound is None or not np.isfinite(plan.lower_bound):
        return None
    return (plan.objective - plan.lower_bound) / abs(plan.objective) if plan.objective else 0.0


def counting_speed() -> Speed:
    trace = generate(
        tokens=500_000, layers=24, experts=32, top_k=1, skew=0.5, affinity=0.3, sequences=500, seed=0
    )
    return speed("counting", trace, lambda: count_affinity(trace))


def evaluation_speed() -> Speed:
    trace = generate(
        tokens=60_000, layers=24, experts=32, top_k=4, skew=0.5, affinity=0.3, sequences=300, seed=0
    )
    plan = place(trace, topology_of(8, 1), solving=Solving(method="sweep"))
    return speed("evaluation", trace, lambda: evaluate(plan, trace))


SPEEDS = {"counting": counting_speed, "evaluation": evaluation_speed}


def speed(name: str, trace: RoutingTrace, run: Callable[[], object]) -> Speed:
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    load = f"{trace.num_tokens} tokens x {trace.num_layers} layers x top-{trace.top_k} of {trace.num_experts}"
    token_layers = trace.num_tokens * trace.num_layers / min(seconds)
    return Speed(name, load, min(seconds), statistics.median(seconds), token_layers)


def compile_all() -> None:
    """So that no method is charged for compiling what it calls first."""
    progress.print("compiling")
    tiny = Family("tiny", partial(generated, 1000, 3, 8, 2), (topology_of(4, 1), topology_of(4, 2)))
    for case in cases(tiny, lambda _: True):
        for method in (name for name in METHODS if not name.startswith("integer")):
            measure(case, method)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, metavar="DIR", help="recorded traces (.npz)")
    parser.add_argument(
        "--as-recorded", action="store_true", help="keep loops, repeated turns and the common prompt"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="what has this in its name; repeatable"
    )
    parser.add_argument("--large", action="store_true", help="DeepSeek-V3's shape too, on 32 and 64 GPUs")
    parser.add_argument("--no-ilp", action="store_true", help="leave out the integer program")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    return parser.parse_args()


def run_cases(family: Family, given: argparse.Namespace, results: Results) -> None:
    for case in cases(family, partial(is_wanted, given.only)):
        for method in case.methods:
            if given.no_ilp and method.startswith("integer"):
                continue
            progress.print(f"{case.name}: {method} ...", end=" ")
            row = measure(case, method)
            progress.print(f"skipped: {row.skipped}" if row.skipped else f"{row.seconds:.2f} s")
            results.rows.append(row)
            results.write()


def main() -> None:
    given = arguments()
    traces = existing(given.traces, "problems")
    results = Results(given.output, setting("benchmarks.placement.run"))
    compile_all()
    for name, measured in SPEEDS.items():
        if is_wanted(given.only, name):
            progress.print(f"speed of {name}")
            results.speeds.append(measured())
            results.write()
    run_families(
        families(traces, given.as_recorded, given.large),
        lambda family: run_cases(family, given, results),
        results.skipped,
        results.write,
    )
    rows = table(results.rows) if results.rows else None
    show(rows, results.skipped, map(rate_of, results.speeds))


def rate_of(each: Speed) -> str:
    rate = f"{each.token_layers_per_second / 1e6:.1f} million token-layers/s"
    return f"{each.name}: {each.best_seconds:.3f} s for {each.load}, {rate} (best of 3)"


if __name__ == "__main__":
    main()
