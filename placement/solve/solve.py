"""Solves a problem on a topology: the stages of each method, and what is known of the result's quality."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from threading import Event
from time import monotonic

import numpy as np
from threadpoolctl import threadpool_limits

from exflow.errors import InputError
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.anneal import search_all, settings_for
from exflow.placement.solve.bounds import lower_bound
from exflow.placement.solve.descent import Stop, sweep
from exflow.placement.solve.exact import is_exactly_solvable, solve_exactly
from exflow.placement.solve.problem import Assignment, PlacementProblem
from exflow.placement.solve.start import balanced_start, start_inside

METHODS = ("auto", "exact", "search", "sweep", "ilp")
Progress = Callable[[float, float, float], None]  # objective, lower bound, seconds since the start
_FOR_THE_BOUND = 0.15  # of the time, at most; few problems need it
_WARM = 0.1  # hot enough to leave what stages settled, cool enough to keep the most of it
_REFINED = 2  # of the best assignments, as many as the smallest machine has cores
Refine = Callable[[Assignment, Stop], tuple[float, Assignment]]


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
    refine: Refine | None = None,
) -> Solution:
    """Solve over the GPUs; with several nodes, as in the ExFlow paper, first over nodes, then inside each.

    What the two stages find is where the search over all GPUs at once begins, which weighs the links against
    each other. With replicas or a limit on moves there are no stages.

    method      "auto": exact where exactness is cheap, else search.
                "exact": matchings (one expert a GPU) or Viterbi over partitions; ignores the time limit. With
                several nodes each stage is exact, and not both together.
                "search": annealed swaps from several starts, the best of them refined.
                "sweep": descent from the contiguous placement (where it breaks the cap, from a balanced one);
                quick and plain.
                "ilp": search, then the integer program from its result, until proven optimal or out of time
    seed        the same seed gives the same solution, unless a time limit ends a search early
    time_limit  seconds, for all stages together. Ctrl-C ends a stage's search as if its time were up
    progress    called now and then, from this thread or the solver's, about the stage at hand
    refine      called with each of the best assignments that a search found; returns what can be made of it,
                and a cost by which to choose among them

    The solution is feasible, and never dearer than the contiguous placement where that is feasible, before it
    is refined. Raises InputError on an unknown method, one that does not apply, a bad time limit, a topology
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
    run = _Run(method, seed, time_limit, progress, refine)
    with threadpool_limits(
        1, user_api="blas"
    ):  # each core has a search of its own: BLAS threads only get in the way
        return _solve(problem, topology, run)


def _solve(problem: PlacementProblem, topology: Topology, run: "_Run") -> Solution:
    start = balanced_start(problem)
    early = run.share(_FOR_THE_BOUND)
    bound = certified_bound(problem, topology, stop=lambda: early.left() == 0)
    searching = replace(run, time_limit=run.time_limit * (1 - _FOR_THE_BOUND))
    in_stages = 1 not in (topology.num_nodes, topology.gpus_per_node)
    if in_stages and not problem.has_replicas and problem.anchor is None:
        assignment, method = _in_stages(problem, topology, start, searching)
    else:
        assignment, proven, method = _solve_stage(problem, start, bound, searching)
        bound = max(bound, proven)
    cost = problem.cost(assignment)
    if bound < cost * (1 - 1e-9):
        bound = max(bound, certified_bound(problem, topology, assignment, lambda: run.left() == 0))
    bound = min(bound, cost)  # above it by rounding only
    solution = Solution(assignment, cost, bound, cost - bound <= 1e-9 * abs(cost), method)
    run.report(solution.objective, solution.lower_bound)
    return solution


def certified_bound(
    problem: PlacementProblem,
    topology: Topology,
    known: Assignment | None = None,
    stop: Stop = lambda: False,
) -> float:
    """A cost that no feasible assignment is below; tighter with a `known` one, and slower until `stop`.

    The distance is at least that of the nearest parts, and between nodes at least what it is between the
    nearest of those: pairs pay the first for being on different GPUs and the difference for being on
    different nodes. Some part has the heaviest expert.
    """
    distance, node = problem.distances, topology.node_of_rank
    pairs = 0.0
    if topology.num_ranks > 1:
        nearest = distance[~np.eye(len(distance), dtype=bool)].min()
        pairs = nearest * lower_bound(problem, known, stop)
        if topology.num_nodes > 1:
            nearest_node = distance[node[:, None] != node].min()
            between = replace(
                problem, num_parts=topology.num_nodes, distance=None, anchor=None, max_moves=None
            )
            pairs += max(0.0, nearest_node - nearest) * lower_bound(
                between, None if known is None else known // topology.gpus_per_node, stop
            )
    heaviest = problem.load.max(axis=1, keepdims=True)
    return float(problem.constant + pairs + problem.imbalance_cost(heaviest))


@dataclass(frozen=True)
class _Run:
    """The options of one solve, and its clock, which runs from construction."""

    method: str
    seed: int
    time_limit: float
    progress: Progress | None
    refine: Refine | None
    began: float = field(default_factory=monotonic)
    interrupted: Event = field(default_factory=Event)  # by Ctrl-C: then the time is up for all that follows

    def left(self) -> float:
        """Seconds until the time is up."""
        return 0.0 if self.interrupted.is_set() else max(0.0, self.began + self.time_limit - monotonic())

    def share(self, part: float) -> "_Run":
        """Options for a stage that may take this share of the time left, and is not refined."""
        time_limit = monotonic() - self.began + part * self.left()
        return replace(self, time_limit=time_limit, refine=None)

    def report(self, cost: float, bound: float) -> None:
        if self.progress:
            self.progress(cost, bound, monotonic() - self.began)


def _in_stages(
    problem: PlacementProblem, topology: Topology, start: Assignment, run: _Run
) -> tuple[Assignment, str]:
    """Solve over nodes, then over the GPUs inside each; if a stage was a search, search all GPUs from it."""
    per_node = topology.gpus_per_node
    over_nodes = replace(
        problem,
        num_parts=topology.num_nodes,
        distance=None,
        max_load=problem.max_load * per_node,
        balance_price=problem.balance_price / per_node,
    )
    nodes, _, nodes_by = _solve_stage(over_nodes, start // per_node, 0.0, run.share(0.4))
    assignment = start_inside(problem, nodes, start)
    for node in range(topology.num_nodes):
        ranks = np.arange(node * per_node, (node + 1) * per_node)
        experts = np.stack([np.flatnonzero(row == node) for row in assignment // per_node])
        inside = problem.restricted(experts, ranks)
        if len(np.unique(inside.distances)) <= 2:  # 0 and one other
            inside = replace(inside, distance=None)
        begin = np.take_along_axis(assignment, experts, axis=1) % per_node
        share = run.share(0.5 / (topology.num_nodes - node))
        gpus, _, gpus_by = _solve_stage(inside, begin, 0.0, share)
        np.put_along_axis(assignment, experts, ranks[gpus], axis=1)
    method = f"{nodes_by} over nodes, {gpus_by} inside nodes"
    assignment = min(start, assignment, key=problem.cost)
    if run.method in ("auto", "search"):
        settings = replace(settings_for(problem), starts=2, hot=_WARM)
        found = search_all(
            problem,
            assignment,
            seed=run.seed,
            settings=settings,
            time_limit=run.left(),
            other=start,
            interrupted=run.interrupted,
        )
        assignment, method = _refined(found, run), f"{method}, search over all"
    return assignment, method


def _solve_stage(
    problem: PlacementProblem, start: Assignment, bound: float, run: _Run
) -> tuple[Assignment, float, str]:
    """(assignment, lower bound, method) over the parts of one problem, from a feasible start."""
    method = run.method
    if method == "auto":
        method = "exact" if is_exactly_solvable(problem) else "search"

    def report(cost: float, proven: float = -math.inf) -> None:
        run.report(cost, max(bound, proven))

    match method:
        case "exact":
            assignment = solve_exactly(problem)
            bound = problem.cost(assignment)
        case "sweep":
            assignment = sweep(problem, start, lambda: run.left() == 0)
        case "search":
            found = search_all(
                problem,
                start,
                seed=run.seed,
                time_limit=run.left(),
                report=report,
                interrupted=run.interrupted,
            )
            assignment = _refined(found, run)
        case "ilp":
            from exflow.placement.solve.ilp import solve_program  # PuLP and HiGHS: only if wanted

            found = search_all(
                problem,
                start,
                seed=run.seed,
                time_limit=run.left() / 2,
                report=report,
                interrupted=run.interrupted,
            )
            start = found[0]
            result = solve_program(problem, start, time_limit=run.left(), report=report)
            assignment, bound = result.assignment, max(bound, result.lower_bound)
    return assignment, bound, method


def _refined(found: list[Assignment], run: _Run) -> Assignment:
    """The best that refining makes of the best assignments, one on each core."""
    if run.refine is None:
        return found[0]

    def stop() -> bool:
        return run.left() == 0

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=cores) as pool:
        runs = [pool.submit(run.refine, assignment, stop) for assignment in found[:_REFINED]]
        try:
            wait(runs)
        except KeyboardInterrupt:
            run.interrupted.set()
        return min((each.result() for each in runs), key=lambda result: result[0])[1]
