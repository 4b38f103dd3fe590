"""The methods that the benchmark by time compares, each a function from a problem to a plan."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.placement.grace import grouped_slots
from benchmarks.placement.methods import Case
from exflow.placement.fastest_plan import place_for_time
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.replicas import equal_slots
from exflow.placement.plan.strategy import Strategy
from exflow.placement.solve.objective import Objective
from exflow.placement.time.serving import Serving

FOR_MESSAGES = Objective(Strategy.DISPATCH_COMBINE)


@dataclass(frozen=True, eq=False)
class Problem:
    """A case in an engine on a machine.

    redundant    slots of each layer beyond one for each expert, before all GPUs have equally many
    time_limit   seconds of a search
    """

    case: Case
    serving: Serving
    redundant: int
    time_limit: float = math.inf


def by_messages(problem: Problem, method: str = "auto") -> Plan:
    """`exflow place --objective messages` for dispatch-combine, baselines included."""
    case = problem.case
    return place(
        case.train,
        case.topology,
        objective=FOR_MESSAGES,
        solving=Solving(method, time_limit=problem.time_limit),
        redundant_experts=problem.redundant,
        counts=[case.counts],
    )


def by_time(problem: Problem) -> Plan:
    """`exflow place --objective time`."""
    case = problem.case
    return place_for_time(
        case.train,
        case.topology,
        problem.serving,
        time_limit=problem.time_limit,
        redundant_experts=problem.redundant,
    )


def by_groups(problem: Problem) -> Plan:
    """GRACE-MoE's idea."""
    case = problem.case
    num_slots = equal_slots(case.train.num_experts + problem.redundant, case.topology.num_ranks)
    slots = grouped_slots(case.counts, case.topology, num_slots)
    return Plan.of_slots(slots, case.topology, case.train, method="groups", strategy=problem.serving.strategy)


METHODS: dict[str, Callable[[Problem], Plan]] = {
    "contiguous": partial(by_messages, method="contiguous"),
    "load-only": partial(by_messages, method="load-only"),
    "GRACE-MoE's idea": by_groups,
    "messages": by_messages,
    "time": by_time,
}
