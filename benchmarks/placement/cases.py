"""The problems of the placement benchmark: routing, split in what is seen and what judges, and GPUs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.placement.methods import ALL, FEW, PAIRWISE, Case, SkippedError
from benchmarks.routing.generated import generate
from benchmarks.routing.recorded import Recorded, each_alone, independent, joined, numbered, read
from exflow.placement.counts.affinity import count_affinity
from exflow.placement.plan.topology import Topology, topology_of
from exflow.profiling.trace import RoutingTrace

progress = Console(stderr=True, highlight=False)
MANY = (topology_of(32, 4), topology_of(64, 8))


@dataclass(frozen=True)
class Family:
    """Problems of one trace, which `load` gives."""

    name: str
    load: Callable[[], Recorded]
    topologies: tuple[Topology, ...]
    methods: tuple[str, ...] = ALL

    def case_name(self, topology: Topology) -> str:
        nodes = f"-on-{topology.num_nodes}-nodes" if topology.num_nodes > 1 else ""
        return f"{self.name}-{topology.num_ranks}{nodes}"


def families(traces: Path | None, whole: bool, large: bool) -> list[Family]:
    one_node = {gpus: topology_of(gpus, 1) for gpus in (2, 4, 8, 16)}
    few, more = (tuple(one_node[gpus] for gpus in each) for each in ((2, 4, 8), (4, 8, 16)))
    of = partial(routing, traces, whole)
    mixtral = partial(of, "Mixtral-8x7B")
    found = [
        Family("mixtral-top1", partial(first_choices, mixtral), few, PAIRWISE),
        Family("mixtral", mixtral, few),
        Family("gpt-oss", partial(of, "gpt-oss-20b", ("MMLU",)), few),
        Family("deepseek-v2-lite", partial(of, "DeepSeek-V2-Lite"), more),
        Family("small", partial(generated, 20_000, 12, 16, 2), (one_node[4],)),
        Family("middle", partial(generated, 40_000, 32, 64, 6), (one_node[8],)),
    ]
    return [*found, Family("deepseek-v3-shape", v3_shape, MANY, FEW)] if large else found


def v3_shape() -> Recorded:
    """Generated routing of DeepSeek-V3's shape."""
    return generated(100_000, 58, 256, 8)


def generated(tokens: int, layers: int, experts: int, top_k: int) -> Recorded:
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
    return each_alone(trace)


def routing(traces: Path | None, whole: bool, model: str, domains: Sequence[str] = ()) -> Recorded:
    """Routing of all domains of a model or of these; as recorded if `whole`, else without what its sequences
    share."""
    if traces is None:
        raise SkippedError("needs recorded traces; give --traces DIR")
    parts = read(traces, model, domains).values()
    return joined(parts if whole else map(independent, parts))


def first_choices(load: Callable[[], Recorded]) -> Recorded:
    found = load()
    cut = RoutingTrace.from_arrays(
        found.trace.experts[:, :, :1],
        num_experts=found.trace.num_experts,
        sequence=found.trace.sequence,
        position=found.trace.position,
    )
    return replace(found, trace=cut)


def cases(family: Family, wanted: Callable[[str], bool]) -> Iterator[Case]:
    topologies = [each for each in family.topologies if wanted(family.case_name(each))]
    if not topologies:
        return
    progress.print(f"{family.name}: reading or generating its trace")
    found = family.load()
    # numbered anew, since the number says which rank is home, and every rank shall be one
    train, test = (numbered(found.trace.select(rows)) for rows in (~found.held_out, found.held_out))
    counts = count_affinity(train)
    for topology in topologies:
        yield Case(family.case_name(topology), topology, train, test, counts, family.methods)
