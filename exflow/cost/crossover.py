"""Crossovers: values of a property of cluster or workload at which another strategy becomes the fastest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from exflow.cost.simulate import Point, Variant, fastest
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machine import Link

_DOUBLINGS = 6  # range of a quantity, up and down
_HALVINGS = 12  # bisections of the factor's logarithm


@dataclass(frozen=True)
class Crossover:
    """A crossover: when `quantity` is scaled by `factor`, `strategy` becomes the fastest.

    value: the quantity there, in `unit`. strategy: None if no strategy fits into memory there.
    """

    quantity: str
    factor: float
    value: float
    unit: str
    strategy: Strategy | None


@dataclass(frozen=True)
class Quantity:
    """A property of a point. scaled: takes a point and a factor, gives the new point and value."""

    name: str
    unit: str
    scaled: Callable[[Point, float], tuple[Point, float]]


def crossovers(choice: Sequence[Variant], point: Point) -> list[Crossover]:
    """The first crossover of every quantity, as it grows and as it shrinks, up to 64 times each."""
    found = (
        _first_crossover(choice, point, quantity, way)
        for quantity in quantities(choice[0].plan.topology)
        for way in (-1, 1)
    )
    return [each for each in found if each is not None]


def _first_crossover(
    choice: Sequence[Variant], point: Point, quantity: Quantity, way: int
) -> Crossover | None:
    """The first crossover of one quantity; None if there is none. way: 1 for growing, -1 for shrinking."""
    here = _winner(choice, point)

    def changed(log: float) -> bool:
        return _winner(choice, quantity.scaled(point, 2.0 ** (way * log))[0]) != here

    after = next((log for log in range(1, _DOUBLINGS + 1) if changed(log)), None)
    if after is None:
        return None
    low, high = after - 1.0, float(after)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if changed(middle) else (middle, high)
    there, value = quantity.scaled(point, 2.0 ** (way * high))
    return Crossover(quantity.name, 2.0 ** (way * high), value, quantity.unit, _winner(choice, there))


def _winner(choice: Sequence[Variant], point: Point) -> Strategy | None:
    best = fastest(choice, point)
    return None if best is None else best.variant.strategy


def quantities(topology: Topology) -> list[Quantity]:
    """The properties to vary, of the cluster, the model and the workload."""
    nodes = topology.num_nodes > 1
    where = "between nodes" if nodes else "inside the node"
    peers = topology.num_ranks - (topology.gpus_per_node if nodes else 1)

    def link_of(point: Point) -> Link:
        return point.machine.between if nodes else point.machine.inside

    def with_link(point: Point, link: Link) -> Point:
        changed = {"between": link} if nodes else {"inside": link}
        return replace(point, machine=replace(point.machine, **changed))  # type: ignore[arg-type]

    def bandwidth(point: Point, factor: float) -> tuple[Point, float]:
        faster = factor * link_of(point).bytes_per_s
        return with_link(point, replace(link_of(point), bytes_per_s=faster)), faster / 1e9

    def latency(point: Point, factor: float) -> tuple[Point, float]:
        now = link_of(point)
        later = replace(now, latency_s=factor * now.latency_s, peer_s=factor * now.peer_s)
        return with_link(point, later), 1e6 * (later.latency_s + later.peer_s * peers)

    def kv_width(point: Point, factor: float) -> tuple[Point, float]:
        return replace(point, kv=factor * point.kv), factor * point.kv * point.model.kv_width

    def batch(point: Point, factor: float) -> tuple[Point, float]:
        sequences = max(1, round(factor * point.batch))
        return replace(point, batch=sequences), sequences / topology.num_ranks

    def context(point: Point, factor: float) -> tuple[Point, float]:
        positions = max(1, round(factor * point.context))
        return replace(point, context=positions), positions

    return [
        Quantity("K/V width", "numbers a layer", kv_width),
        Quantity(f"bandwidth {where}", "GB/s a GPU", bandwidth),
        Quantity(f"latency {where}", "us an exchange", latency),
        Quantity("batch", "sequences a GPU", batch),
        Quantity("context", "positions", context),
    ]
