"""The methods that the placement benchmark compares, each a function from a problem to a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.placement.metis import partition
from exflow.placement.counts.affinity import AffinityCounts
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.objective import Objective, make_problem
from exflow.placement.solve.problem import PlacementProblem
from exflow.profiling.trace import RoutingTrace

ILP_SECONDS = 60.0
ILP_EXPERTS = 1000  # of all layers: more take longer to write down than to place otherwise
TIME_LIMIT = 30.0  # the command line's default
BALANCED, CAP = 2.5, 1.1
FOR_ENGINES = Objective(strategy=Strategy.DISPATCH_COMBINE, balance_price=BALANCED)


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


def ours(case: Case, objective: Objective | None = None, method: str = "auto") -> Plan:
    """What `exflow place` does, baselines included."""
    solving = Solving(method=method, time_limit=TIME_LIMIT)
    return place(case.train, case.topology, objective=objective, solving=solving, counts=[case.counts])


def integer_program(case: Case) -> Plan:
    """The paper's, from the contiguous placement."""
    from exflow.placement.solve.ilp import solve_program

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
    problem = pairwise(case)
    try:
        assignment = partition(problem)
    except ImportError as error:
        raise SkippedError(f"pymetis cannot be imported ({error}); pip install pymetis") from error
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
    "ours balanced, dispatch-combine": partial(ours, objective=FOR_ENGINES),
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
