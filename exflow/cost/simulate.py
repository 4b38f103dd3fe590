"""Simulates decode steps on clusters of any size by the cost model, with the traffic of a trace under plans.

GPUs form expert-parallel groups of `width` ranks; each group holds all experts once. Groups are equal and
independent: they share no tokens, no keys and values, and no links. So a step takes as long as in one group,
and the throughputs of the groups add up.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from exflow.cost.auto import step_traffic
from exflow.cost.batches import DrawnBatches
from exflow.cost.predict import Prediction, predict
from exflow.cost.workload import StepTraffic, Workload
from exflow.model.config import ModelConfig
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.time.machine import Machine
from exflow.profiling.trace import RoutingTrace

ITEMSIZE = 2  # bfloat16
PLACEMENTS = {"contiguous": "contiguous", "affinity": "auto"}  # name -> placement method
LEVEL = 1.0  # price of a unit of imbalance, in messages per token and layer: all ranks wait for the busiest
_MOST_ROWS = 32  # length of the sequences into which a trace is split


@dataclass(frozen=True)
class Layout:
    """`gpus` GPUs on nodes of `gpus_per_node`, in expert-parallel groups of `width`."""

    gpus: int
    gpus_per_node: int
    width: int

    @classmethod
    def of(cls, gpus: int, gpus_per_node: int, experts: int, widest: int | None = None) -> Self:
        """Make the groups as wide as possible, at most `widest` ranks.

        A width divides GPUs and experts. A group lies inside a node or fills whole nodes.
        """
        widths = range(1, min(gpus, experts, widest or gpus) + 1)
        even = [width for width in widths if gpus % width == 0 and experts % width == 0]
        return cls(
            gpus,
            gpus_per_node,
            max(width for width in even if gpus_per_node % width == 0 or width % gpus_per_node == 0),
        )

    @property
    def copies(self) -> int:
        """The number of expert-parallel groups."""
        return self.gpus // self.width

    @property
    def topology(self) -> Topology:
        """The nodes and GPUs of one group."""
        inside = min(self.width, self.gpus_per_node)
        return Topology(num_nodes=self.width // inside, gpus_per_node=inside)


@dataclass(frozen=True, eq=False)
class Variant:
    """A strategy with a placement, its traffic on a trace, and batches drawn from the trace."""

    strategy: Strategy
    placement: str
    plan: Plan
    traffic: StepTraffic
    batches: DrawnBatches

    @classmethod
    def of(cls, strategy: Strategy, placement: str, plan: Plan, trace: RoutingTrace) -> Self:
        topology = plan.topology
        size = strategy.group_size(topology.num_ranks, topology.gpus_per_node)
        traffic = step_traffic(plan, trace, size)
        if strategy == Strategy.REPLICATED:
            layers, nothing = plan.num_layers, (0.0, 0.0)
            traffic = replace(traffic, exchanges=0, dispatch=nothing, combine=nothing, all_reduces=layers)
        return cls(strategy, placement, plan, traffic, DrawnBatches(plan, trace, strategy))


def strategies_on(topology: Topology) -> Iterator[Strategy]:
    """The strategies that differ on `topology`; on a single rank only one."""
    yield Strategy.DISPATCH_COMBINE
    if 1 < topology.gpus_per_node < topology.num_ranks:
        yield Strategy.NODE_COHERENT
    if topology.num_ranks > 1:
        yield Strategy.COHERENT
        yield Strategy.REPLICATED


def variants(
    train: RoutingTrace,
    test: RoutingTrace,
    topology: Topology,
    time_limit: float,
    tell: Callable[[str], None],
) -> list[Variant]:
    """Every strategy with a contiguous and an affinity placement, made on `train`, judged on `test`."""
    judged, found = split_sequences(test, topology.num_ranks), []
    plans: dict[tuple[Strategy, str], Plan] = {}
    for strategy in strategies_on(topology):
        goal = strategy.placed_for
        for placement, method in PLACEMENTS.items():
            if (goal, placement) not in plans:
                tell(f"{topology}: {placement} for {goal}")
                plans[goal, placement] = place(
                    train,
                    topology,
                    objective=Objective(goal, balance_price=LEVEL, owner_price=LEVEL),
                    solving=Solving(method, time_limit=time_limit),
                )
            found.append(Variant.of(strategy, placement, plans[goal, placement], judged))
    return found


def split_sequences(trace: RoutingTrace, ranks: int) -> RoutingTrace:
    """Split the sequences of a trace into short ones, so that every rank is home to tokens of many texts."""
    order = np.argsort(trace.sequence, kind="stable")
    length = min(_MOST_ROWS, max(1, trace.num_tokens // (4 * ranks)))
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

    kv: factor on the model's K/V width.
    """

    model: ModelConfig
    batch: int
    context: int
    machine: Machine
    kv: float = 1.0


@dataclass(frozen=True)
class Step:
    """The predicted step of a variant at a point. fits: True if it fits into memory."""

    variant: Variant
    prediction: Prediction
    fits: bool

    @property
    def seconds(self) -> float:
        return self.prediction.step_s


def step(variant: Variant, point: Point) -> Step:
    """Predict a variant's step at a point."""
    workload = Workload.of(point.model, variant.plan, point.batch, point.context, ITEMSIZE)
    workload = replace(workload, kv_bytes=round(point.kv * workload.kv_bytes))
    traffic = replace(variant.traffic, drawn=variant.batches.of(workload.tokens_per_rank))
    prediction = predict(variant.strategy, workload, traffic, point.machine)
    return Step(variant, prediction, prediction.memory_bytes <= point.machine.memory_bytes)


def fastest(choice: Sequence[Variant], point: Point) -> Step | None:
    """The fastest step that fits into memory, the first among equals; None if none fits."""
    steps = (step(variant, point) for variant in choice)
    return min((each for each in steps if each.fits), key=lambda each: each.seconds, default=None)
