"""Decode steps on clusters that one does not have: the cost model, fed with what a trace moves under plans.

GPUs form expert-parallel groups of `width` ranks that hold all experts once. GPUs beyond one group are
further groups, equal and independent: they share no token, no keys and values, and no link. A step then takes
what it takes one group, and throughput is that of all.

Shapes: L MoE layers, G ranks, E experts, S slots a rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from exflow.cost.auto import moved_by
from exflow.cost.predict import Load, Machine, Moved, Prediction, predict
from exflow.model.config import ModelConfig
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Name
from exflow.placement.plan.strategy import Strategy as PlanStrategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.profiling.trace import RoutingTrace

ITEMSIZE = 2  # bfloat16
PLACEMENTS = {"contiguous": "contiguous", "affinity": "auto"}  # and the methods that make them
LEVEL = 1.0  # messages a token and layer that a unit of imbalance is worth: all wait for the busiest
PLACED_FOR: dict[Name, PlanStrategy] = {  # no message of replicated depends on its placement
    "dispatch-combine": "dispatch-combine",
    "node-coherent": "node-coherent",
    "coherent": "coherent",
    "replicated": "dispatch-combine",
}
_ROWS = 32  # of a sequence that a trace is dealt into, at most

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """`gpus` GPUs on nodes of `gpus_per_node`, in expert-parallel groups of `width`."""

    gpus: int
    gpus_per_node: int
    width: int

    @classmethod
    def of(cls, gpus: int, gpus_per_node: int, experts: int, widest: int | None = None) -> Self:
        """In groups as wide as they can be, `widest` at most: they share experts and GPUs evenly, and lie in
        a node or fill some."""
        widths = range(1, min(gpus, experts, widest or gpus) + 1)
        even = [width for width in widths if gpus % width == 0 and experts % width == 0]
        return cls(
            gpus,
            gpus_per_node,
            max(width for width in even if gpus_per_node % width == 0 or width % gpus_per_node == 0),
        )

    @property
    def copies(self) -> int:
        """Expert-parallel groups."""
        return self.gpus // self.width

    @property
    def topology(self) -> Topology:
        """Of one group."""
        inside = min(self.width, self.gpus_per_node)
        return Topology(num_nodes=self.width // inside, gpus_per_node=inside)


@dataclass(frozen=True, eq=False)
class Variant:
    """A strategy with a placement, and what it moves and touches on a trace.

    chosen [L, G, S] float64: the chance that a token chooses the expert in a slot, and is served there.
    """

    strategy: Name
    placement: str
    plan: Plan
    moved: Moved
    chosen: Floats

    @classmethod
    def of(cls, strategy: Name, placement: str, plan: Plan, trace: RoutingTrace) -> Self:
        topology = plan.topology
        sizes = {"node-coherent": topology.gpus_per_node, "coherent": topology.num_ranks}
        moved = moved_by(plan, trace, sizes.get(strategy, 1))
        if strategy == "replicated":
            layers, nothing = plan.num_layers, (0.0, 0.0)
            moved = replace(moved, exchanges=0, dispatch=nothing, give_back=nothing, all_reduces=layers)
        return cls(strategy, placement, plan, moved, chosen_slots(plan, trace))

    def experts_read(self, batch: int) -> float:
        """Of a layer, by the rank that reads most, where so many tokens choose: the mean over layers."""
        read = 1 - (1 - self.chosen) ** batch
        return float(read.sum(axis=2).max(axis=1).mean())


def chosen_slots(plan: Plan, trace: RoutingTrace) -> Floats:
    """[L, G, S] the chance that a token chooses the expert in a slot, and is served there."""
    chances, serving_slot = np.zeros((plan.num_layers, plan.num_slots)), plan.serving_slot
    for layer in range(plan.num_layers):
        chosen = np.bincount(trace.experts[:, layer].ravel(), minlength=plan.num_experts)
        asked = np.broadcast_to(chosen / trace.num_tokens, (plan.num_ranks, plan.num_experts))
        serving = serving_slot[:, layer]
        of_layer = np.bincount(serving[serving >= 0], asked[serving >= 0], minlength=plan.num_slots)
        chances[layer] = of_layer / plan.num_ranks
    return chances.reshape(plan.num_layers, plan.num_ranks, -1)


def strategies_on(topology: Topology) -> Iterator[Name]:
    """Those that differ; a rank that is alone has one."""
    yield "dispatch-combine"
    if 1 < topology.gpus_per_node < topology.num_ranks:
        yield "node-coherent"
    if topology.num_ranks > 1:
        yield "coherent"
        yield "replicated"


def variants(
    train: RoutingTrace,
    test: RoutingTrace,
    topology: Topology,
    time_limit: float,
    tell: Callable[[str], None],
) -> list[Variant]:
    """Every strategy, contiguous and with a placement by affinity made for it, judged on `test`."""
    dealt, found = deal(test, topology.num_ranks), []
    plans: dict[tuple[PlanStrategy, str], Plan] = {}
    for strategy in strategies_on(topology):
        goal = PLACED_FOR[strategy]
        for placement, method in PLACEMENTS.items():
            if (goal, placement) not in plans:
                tell(f"{topology}: {placement} for {goal}")
                plans[goal, placement] = place(
                    train,
                    topology,
                    objective=Objective(goal, balance_price=LEVEL, owner_price=LEVEL),
                    solving=Solving(method, time_limit=time_limit),
                )
            found.append(Variant.of(strategy, placement, plans[goal, placement], dealt))
    return found


def deal(trace: RoutingTrace, ranks: int) -> RoutingTrace:
    """The trace in short pieces as sequences, so that every rank is home to tokens of many texts."""
    order = np.argsort(trace.sequence, kind="stable")
    length = min(_ROWS, max(1, trace.num_tokens // (4 * ranks)))
    return RoutingTrace.from_arrays(
        trace.experts[order],
        num_experts=trace.num_experts,
        sequence=np.arange(trace.num_tokens) // length,
        model=trace.model,
        moe_layer_ids=trace.moe_layer_ids,
        num_hidden_layers=trace.num_hidden_layers,
        experts_per_layer=trace.experts_per_layer,
    )


@dataclass(frozen=True)
class Point:
    """A decode step of one expert-parallel group: `batch` sequences, each at position `context`.

    kv: times the model's own K/V width.
    """

    model: ModelConfig
    batch: int
    context: int
    machine: Machine
    kv: float = 1.0


@dataclass(frozen=True)
class Step:
    """What a variant takes there, and whether it fits into memory."""

    variant: Variant
    prediction: Prediction
    fits: bool

    @property
    def seconds(self) -> float:
        return self.prediction.step_s


def step(variant: Variant, point: Point) -> Step:
    load = Load.of(point.model, variant.plan, point.batch, point.context, ITEMSIZE)
    load = replace(
        load,
        kv_bytes=round(point.kv * load.kv_bytes),
        experts_read=variant.experts_read(point.batch),
    )
    prediction = predict(variant.strategy, load, variant.moved, point.machine)
    return Step(variant, prediction, prediction.memory_bytes <= point.machine.memory_bytes)


def fastest(choice: Sequence[Variant], point: Point) -> Step | None:
    """The fastest of those that fit, the first of equals; None if none fits."""
    steps = (step(variant, point) for variant in choice)
    return min((each for each in steps if each.fits), key=lambda each: each.seconds, default=None)
