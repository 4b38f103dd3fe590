"""The recipe: from a problem and a topology to a placement, and what is known about its quality."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np

from exflow.errors import InputError
from exflow.placement.balance import balanced_start, start_inside
from exflow.placement.bounds import lower_bound
from exflow.placement.exact import is_exactly_solvable, solve_exactly
from exflow.placement.problem import Assignment, PlacementProblem
from exflow.placement.search import search
from exflow.placement.sweep import sweep
from exflow.placement.topology import Topology

METHODS = ("auto", "exact", "search", "sweep", "ilp")
Progress = Callable[[float, float, float], None]  # objective, lower bound, seconds since the start


@dataclass(frozen=True)
class Solution:
    """A placement, and what is known about its quality."""

    assignment: Assignment  # [L, E] the rank of every expert
    objective: float  # its cost, in the unit of the problem's prices
    lower_bound: float  # on the cost of every feasible assignment
    optimal: bool  # proven to cost the least
    method: str


def solve(
    problem: PlacementProblem,
    topology: Topology,
    *,
    method: str = "auto",
    seed: int = 0,
    time_limit: float = math.inf,
    progress: Progress | None = None,
) -> Solution:
    """Solve over the GPUs, or, as in the ExFlow paper, first over the nodes and then inside each node.

    With several nodes the order is strict: what crosses between nodes is minimised first, and what is left
    inside each node after that; the objective stays the cost between GPUs. The problem's cap is on a GPU; a
    node may hold as many times that as it has GPUs.

    method      auto: exact where exactness is cheap, else search
                exact: matchings (one expert a GPU) or Viterbi over partitions; ignores the time limit
                search: annealed swaps from several starts
                sweep: descent from the contiguous placement (where it breaks the cap, from a balanced one),
                quick and plain
                ilp: search, then the integer program from its result, until proven optimal or out of time
    seed        the same seed gives the same solution, unless a time limit ends a search early
    time_limit  seconds, for all stages together. Ctrl-C ends a stage's search as if its time were up
    progress    called now and then, from this thread or the solver's, about the stage at hand

    The solution is feasible, and on one node never dearer than the contiguous placement where that is
    feasible. Raises InputError on an unknown method, one that does not apply, a bad time limit, a topology
    that the problem was not made for, or a cap that cannot be kept (with the smallest that can).
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not time_limit >= 0:
        raise InputError(f"time limit {time_limit} is not a number of seconds; choose 0 or more")
    if problem.num_parts != topology.num_ranks:
        raise InputError(
            f"the problem has {problem.num_parts} parts, the topology {topology.num_ranks} ranks; "
            "make them equal"
        )
    start = balanced_start(problem)
    if 1 in (topology.num_nodes, topology.gpus_per_node):
        return _solve_stage(problem, start, method, seed, time_limit, progress)

    per_node = topology.gpus_per_node
    over_nodes = replace(problem, num_parts=topology.num_nodes, max_load=problem.max_load * per_node)
    nodes = _solve_stage(over_nodes, start // per_node, method, seed, time_limit / 2, progress)
    assignment = start_inside(problem, nodes.assignment, start)
    for node in range(topology.num_nodes):
        experts = np.stack([np.flatnonzero(row == node) for row in assignment // per_node])
        inside_node = problem.restricted(experts, per_node)
        begin = np.take_along_axis(assignment, experts, axis=1) % per_node
        share = time_limit / 2 / topology.num_nodes
        gpus = _solve_stage(inside_node, begin, method, seed, share, progress)
        np.put_along_axis(assignment, experts, node * per_node + gpus.assignment, axis=1)
    description = f"{nodes.method} over nodes, {gpus.method} inside nodes"
    return _solution(problem, assignment, lower_bound(problem), description)


def _solve_stage(
    problem: PlacementProblem,
    start: Assignment,
    method: str,
    seed: int,
    time_limit: float,
    progress: Progress | None,
) -> Solution:
    """Solve over the parts of one problem, all alike, from a feasible start."""
    if method == "auto":
        method = "exact" if is_exactly_solvable(problem) else "search"
    began = monotonic()
    bound = lower_bound(problem)

    def time_left() -> float:
        return max(0.0, began + time_limit - monotonic())

    def report(cost: float, proven: float = -math.inf) -> None:
        if progress:
            progress(cost, max(bound, proven), monotonic() - began)

    match method:
        case "exact":
            assignment = solve_exactly(problem)
            bound = problem.cost(assignment)
        case "sweep":
            assignment = sweep(problem, start, lambda: time_left() == 0)
        case "search":
            assignment = search(problem, start, seed=seed, time_limit=time_left(), report=report)
        case "ilp":
            from exflow.placement.ilp import solve_program  # PuLP and HiGHS: only if wanted

            start = search(problem, start, seed=seed, time_limit=time_left() / 2, report=report)
            result = solve_program(problem, start, time_limit=time_left(), report=report)
            assignment, bound = result.assignment, max(bound, result.lower_bound)
    solution = _solution(problem, assignment, bound, method)
    report(solution.objective, solution.lower_bound)
    return solution


def _solution(problem: PlacementProblem, assignment: Assignment, bound: float, method: str) -> Solution:
    cost = problem.cost(assignment)
    bound = min(bound, cost)  # above it by rounding only
    return Solution(assignment, cost, bound, cost - bound <= 1e-9 * cost, method)
