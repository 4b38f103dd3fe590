"""What placement gains, by method, side by side: real and generated routing, judged on held-out tokens.

    python benchmarks/placement.py [--traces DIR] [--only NAME]... [--large] [--no-ilp] [-o FILE.json]

DIR holds recorded traces as .npz (arrays experts, seq, pos, num_experts, optionally group); without it the
problems made from them are left out. A trace is split by sequence, or by group where it has that: every
fourth is for testing, the methods see the rest. A plan is made once and judged under two strategies, in
messages per token and layer: with coherence, and with dispatch and combine, which is what engines do today.
The table's ratios, of test tokens, are to dispatch and combine with the contiguous placement.

Seconds are those of the call that makes the plan, from counts made before: for our own methods that includes
the evaluation on the training tokens, which is most of what the contiguous placement takes. Compiling is done
before. The cold integer program has the paper's objective, pairs of adjacent layers and of a layer without a
price on imbalance, and begins from the contiguous placement; its time limit does not count writing it down.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from generated_routing import generate
from rich.console import Console
from rich.table import Table

from exflow.errors import InputError
from exflow.files import atomic_path
from exflow.placement.affinity import AffinityCounts, count_affinity
from exflow.placement.baselines import contiguous
from exflow.placement.evaluate import evaluate
from exflow.placement.objective import Objective, make_problem
from exflow.placement.place import Solving, place
from exflow.placement.plan import Plan
from exflow.placement.problem import Assignment, PlacementProblem, one_hot
from exflow.placement.topology import Topology, topology_of
from exflow.profiling.merge import merge
from exflow.profiling.trace import RoutingTrace

ILP_SECONDS = 60.0
ILP_EXPERTS = 1000  # of all layers: more take longer to write down than to place otherwise
EDGE_WEIGHTS = 1_000_000_000  # their sum: the partitioner has 32-bit integers
TIME_LIMIT = 30.0  # the command line's default
BALANCED, CAP = 2.5, 1.1

progress = Console(stderr=True, highlight=False)


class SkippedError(Exception):
    """Not an error: why something is left out."""


@dataclass(frozen=True, eq=False)
class Case:
    """A placement problem: what the methods see, and what they are judged on."""

    name: str
    topology: Topology
    train: RoutingTrace
    test: RoutingTrace
    counts: AffinityCounts  # of `train`
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Messages:
    """Per token and layer; those between nodes are among them."""

    train: float
    test: float
    train_between_nodes: float | None  # None: one node
    test_between_nodes: float | None


@dataclass(frozen=True)
class Row:
    """A method's plan for a problem, or why there is none."""

    problem: str
    method: str
    seconds: float | None = None
    coherent: Messages | None = None
    dispatch_combine: Messages | None = None
    test_imbalance: float | None = None  # mean over layers
    gap: float | None = None  # (objective - lower bound) / objective, where both are known
    optimal: bool | None = None
    solved_by: str = ""
    skipped: str = ""


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
        if self.output is None:
            return
        document = {
            **self.setting,
            "skipped": self.skipped,
            "speeds": [asdict(speed) for speed in self.speeds],
            "rows": [asdict(row) for row in self.rows],
        }
        with atomic_path(self.output) as path:
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


# --- methods ---


def ours(case: Case, objective: Objective | None = None, method: str = "auto") -> Plan:
    """What `exflow place` does, baselines included."""
    solving = Solving(method=method, time_limit=TIME_LIMIT)
    return place(case.train, case.topology, objective=objective, solving=solving, counts=[case.counts])


def integer_program(case: Case) -> Plan:
    """The paper's, from the contiguous placement."""
    from exflow.placement.ilp import solve_program

    problem = pairwise(case)
    if problem.load.size > ILP_EXPERTS:
        raise SkippedError(f"{problem.load.size} experts in all layers, more than {ILP_EXPERTS}")
    result = solve_program(problem, contiguous(*problem.shape), time_limit=ILP_SECONDS)
    return Plan.from_ranks(
        result.assignment,
        case.topology,
        case.train,
        method="ilp",
        objective=problem.cost(result.assignment),
        lower_bound=result.lower_bound,
        optimal=result.optimal,
    )


def graph_partitioner(case: Case) -> Plan:
    """METIS on the graph of all layers' experts, with its parts made equal in each layer afterwards."""
    try:
        import pymetis
    except ImportError as error:
        raise SkippedError(f"pymetis cannot be imported ({error}); pip install pymetis") from error
    problem = pairwise(case)
    adjacency, weights = graph_of(problem)
    graph = pymetis.CSRAdjacency(*adjacency)
    _, parts = pymetis.part_graph(problem.num_parts, graph, eweights=weights)
    assignment = repaired(problem, np.array(parts, dtype=np.int64).reshape(problem.load.shape))
    return Plan.from_ranks(
        assignment, case.topology, case.train, method="metis", objective=problem.cost(assignment)
    )


METHODS: dict[str, Callable[[Case], Plan]] = {
    "contiguous": partial(ours, method="contiguous"),
    "random": partial(ours, method="random"),
    "load-only": partial(ours, method="load-only"),
    "sweep": partial(ours, method="sweep"),
    "ours": ours,
    "ours, free load": partial(ours, objective=Objective(balance_price=0)),
    "ours balanced": partial(ours, objective=Objective(balance_price=BALANCED)),
    "ours capped": partial(ours, objective=Objective(max_imbalance=CAP)),
    "integer program, cold": integer_program,
    "graph partitioner": graph_partitioner,
    "exact, no balance": partial(ours, objective=Objective(balance_price=0), method="exact"),
}
ALL = tuple(METHODS)[:-1]
FEW = ("contiguous", "load-only", "ours")
PAIRWISE = ("contiguous", "exact, no balance")


def pairwise(case: Case) -> PlacementProblem:
    """The prices of pairs alone."""
    replicas = np.ones(case.counts.load.shape, dtype=np.int64)
    return make_problem([case.counts], [1.0], case.topology, Objective(balance_price=0), replicas)


def graph_of(problem: PlacementProblem) -> tuple[tuple[list[int], list[int]], list[int]]:
    """Where the neighbours of each vertex begin and which they are; and the edges' weights, whole numbers.

    Vertex l * E + e is expert e of layer l. Prices too small to be a whole number make no edge.
    """
    layers, experts, _ = problem.shape
    price = np.zeros((layers, experts, layers, experts), dtype=np.float32)
    each = np.arange(layers)
    price[each, :, each, :] = problem.intra
    price[each[:-1], :, each[1:], :] = problem.inter
    price[each[1:], :, each[:-1], :] = problem.inter.transpose(0, 2, 1)
    square = price.reshape(layers * experts, layers * experts)
    weight = np.rint(square * (EDGE_WEIGHTS / square.sum(dtype=np.float64))).astype(np.int64)
    vertex, neighbour = np.nonzero(weight)
    start = np.searchsorted(vertex, np.arange(len(square) + 1))
    return (start.tolist(), neighbour.tolist()), weight[vertex, neighbour].tolist()


def repaired(problem: PlacementProblem, parts: Assignment) -> Assignment:
    """The assignment with equally many experts in each part of each layer.

    Layer by layer, of the experts in parts that have too many that one moves which loses least by going to a
    part with room.
    """
    parts = parts.copy()
    for layer in range(problem.num_layers):
        while (
            surplus := np.bincount(parts[layer], minlength=problem.num_parts) - problem.experts_per_part
        ).any():
            drawn = attachment(problem, parts, layer)
            here = np.take_along_axis(drawn, parts[layer][:, None], axis=1)
            may_go = (surplus[parts[layer]] > 0)[:, None] & (surplus < 0)
            expert, part = np.unravel_index(np.where(may_go, here - drawn, np.inf).argmin(), drawn.shape)
            parts[layer, expert] = part
    return parts


def attachment(problem: PlacementProblem, parts: Assignment, layer: int) -> npt.NDArray[np.float64]:
    """[E, G]: the prices of the pairs of each expert of a layer with the experts in each part."""
    drawn = problem.intra[layer] @ one_hot(parts[layer], problem.num_parts)
    if layer > 0:
        drawn += problem.inter[layer - 1].T @ one_hot(parts[layer - 1], problem.num_parts)
    if layer + 1 < problem.num_layers:
        drawn += problem.inter[layer] @ one_hot(parts[layer + 1], problem.num_parts)
    return np.asarray(drawn)


# --- problems ---


@dataclass(frozen=True)
class Family:
    """Problems of one trace: `load` gives it, and the unit of each token that a split keeps whole."""

    name: str
    load: Callable[[], tuple[RoutingTrace, npt.NDArray[np.int64]]]
    topologies: tuple[Topology, ...]
    methods: tuple[str, ...] = ALL

    def case_name(self, topology: Topology) -> str:
        nodes = f"-on-{topology.num_nodes}-nodes" if topology.num_nodes > 1 else ""
        return f"{self.name}-{topology.num_ranks}{nodes}"


def families(traces: Path | None, large: bool) -> list[Family]:
    one_node = {gpus: topology_of(gpus, 1) for gpus in (2, 4, 8, 16)}
    few, more = (tuple(one_node[gpus] for gpus in each) for each in ((2, 4, 8), (4, 8, 16)))
    mixtral = partial(recorded, traces, "mixtral8x7b_*.npz", 4)
    found = [
        Family("mixtral-top1", partial(first_choices, mixtral), few, PAIRWISE),
        Family("mixtral", mixtral, few),
        Family("gpt-oss", partial(recorded, traces, "gptoss20b_mmlu_validation.npz", 1), few),
        Family("deepseek-v2-lite", partial(recorded, traces, "esft_dsv2lite_*.npz", 1), more),
        Family("small", partial(generated, 20_000, 12, 16, 2), (one_node[4],)),
        Family("middle", partial(generated, 40_000, 32, 64, 6), (one_node[8],)),
    ]
    if large:
        many = (topology_of(32, 4), topology_of(64, 8))
        found.append(Family("deepseek-v3-shape", partial(generated, 100_000, 58, 256, 8), many, FEW))
    return found


def generated(
    tokens: int, layers: int, experts: int, top_k: int
) -> tuple[RoutingTrace, npt.NDArray[np.int64]]:
    trace = generate(
        tokens=tokens,
        layers=layers,
        experts=experts,
        top_k=top_k,
        skew=0.5,
        affinity=0.3,
        sequences=tokens // 200,
        seed=0,
    )
    return trace, trace.sequence.astype(np.int64)


def recorded(traces: Path | None, pattern: str, least: int) -> tuple[RoutingTrace, npt.NDArray[np.int64]]:
    """All files of the pattern in order of name, as one trace, their units numbered on."""
    if traces is None:
        raise SkippedError("needs recorded traces; give --traces DIR")
    files = sorted(traces.glob(pattern))
    if len(files) < least:
        raise SkippedError(f"{traces} has {len(files)} files {pattern}, {least} are needed; give another DIR")
    parts, units, offset = [], [], 0
    for file in files:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        parts.append(
            RoutingTrace.from_arrays(
                arrays["experts"],
                num_experts=int(arrays["num_experts"]),
                sequence=arrays["seq"],
                position=arrays["pos"],
            )
        )
        names, unit = np.unique(arrays.get("group", arrays["seq"]), return_inverse=True)
        units.append(unit + offset)
        offset += len(names)
    return merge(parts), np.concatenate(units)


def first_choices(
    load: Callable[[], tuple[RoutingTrace, npt.NDArray[np.int64]]],
) -> tuple[RoutingTrace, npt.NDArray[np.int64]]:
    trace, units = load()
    cut = RoutingTrace.from_arrays(
        trace.experts[:, :, :1],
        num_experts=trace.num_experts,
        sequence=trace.sequence,
        position=trace.position,
    )
    return cut, units


def cases(family: Family, wanted: Callable[[str], bool]) -> Iterator[Case]:
    topologies = [each for each in family.topologies if wanted(family.case_name(each))]
    if not topologies:
        return
    progress.print(f"{family.name}: reading or generating its trace")
    trace, units = family.load()
    is_test = units % 4 == 3
    train, test = renumbered(trace.select(~is_test)), renumbered(trace.select(is_test))
    counts = count_affinity(train)
    for topology in topologies:
        yield Case(family.case_name(topology), topology, train, test, counts, family.methods)


def renumbered(trace: RoutingTrace) -> RoutingTrace:
    """Sequences numbered through: the number says which rank is home, and every rank shall be one."""
    _, sequence = np.unique(trace.sequence, return_inverse=True)
    return replace(trace, sequence=sequence.astype(np.int32))


# --- measuring ---


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


# --- report ---


def table(rows: list[Row]) -> Table:
    titles = ("s", "train", "test", "ratio", "train", "test", "ratio", "imbalance", "gap", "solved by")
    shown = Table(
        "problem",
        "method",
        title="messages per token and layer: coherent, then dispatch and combine (between nodes in brackets)",
    )
    for title in titles:
        shown.add_column(title, justify="left" if title == "solved by" else "right")
    base = {row.problem: row.dispatch_combine for row in rows if row.method == "contiguous"}
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        last = after is None or after.problem != row.problem
        shown.add_row(row.problem, row.method, *cells(row, base.get(row.problem)), end_section=last)
    return shown


def cells(row: Row, base: Messages | None) -> list[str]:
    if row.coherent is None or row.dispatch_combine is None:
        return [""] * 9 + [f"skipped: {row.skipped}"]
    gap = "" if row.gap is None else f"{row.gap:.2%}"
    return [
        f"{row.seconds:.2f}",
        *message_cells(row.coherent, base),
        *message_cells(row.dispatch_combine, base),
        f"{row.test_imbalance:.3f}",
        "optimal" if row.optimal else gap,
        row.solved_by,
    ]


def message_cells(found: Messages, base: Messages | None) -> list[str]:
    ratio = f"{found.test / base.test:.3f}" if base and base.test else ""
    between = "" if found.test_between_nodes is None else f" ({found.test_between_nodes:.3f})"
    return [f"{found.train:.3f}", f"{found.test:.3f}{between}", ratio]


def setting() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


PACKAGES = ("exflow", "numpy", "numba", "scipy", "highspy", "pymetis")


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, metavar="DIR", help="recorded traces (.npz)")
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


def is_wanted(only: list[str] | None, name: str) -> bool:
    return not only or any(part in name for part in only)


def main() -> None:
    given = arguments()
    if given.traces is not None and not given.traces.is_dir():
        progress.print(f"--traces {given.traces}: is no folder; its problems are left out")
        given.traces = None
    results = Results(given.output, setting())
    compile_all()
    for name, measured in SPEEDS.items():
        if is_wanted(given.only, name):
            progress.print(f"speed of {name}")
            results.speeds.append(measured())
            results.write()
    for family in families(given.traces, given.large):
        try:
            run_cases(family, given, results)
        except SkippedError as reason:
            progress.print(f"{family.name}: skipped: {reason}")
            results.skipped[family.name] = str(reason)
            results.write()
    report(results)


def report(results: Results) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    if results.rows:
        console.print(table(results.rows))
    for each in results.speeds:
        rate = f"{each.token_layers_per_second / 1e6:.1f} million token-layers/s"
        console.print(f"{each.name}: {each.best_seconds:.3f} s for {each.load}, {rate} (best of 3)")
    for name, reason in results.skipped.items():
        console.print(f"{name}: skipped: {reason}")


if __name__ == "__main__":
    main()
