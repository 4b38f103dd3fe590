"""From a trace to a plan: the `exflow place` command, baselines included."""

import math
from dataclasses import replace

import numpy as np

from exflow.errors import InputError
from exflow.placement.affinity import AffinityCounts, count_affinity
from exflow.placement.baselines import contiguous, random
from exflow.placement.evaluate import evaluate
from exflow.placement.plan import Plan
from exflow.placement.problem import PlacementProblem, problem_from_counts
from exflow.placement.solve import METHODS, Progress, Solution, solve
from exflow.placement.topology import Topology
from exflow.profiling.trace import RoutingTrace


def place(
    trace: RoutingTrace,
    topology: Topology,
    *,
    method: str = "auto",
    seed: int = 0,
    time_limit: float = math.inf,
    max_imbalance: float | None = None,
    counts: AffinityCounts | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Place the experts of the trace's model by the affinity that the trace shows.

    method: "contiguous" or "random" for a baseline, else as for `solve`, as are the other arguments.
    max_imbalance: in every layer the busiest rank's load on this trace is at most so many times the mean.
    counts: those of the trace, if they are known already. The plan's expected figures are those of `evaluate`
    on this trace. Raises InputError if the ranks cannot share the experts evenly, the trace holds no tokens,
    or the cap cannot be kept: it says the smallest that can.
    """
    if counts is None:
        counts = count_affinity(trace)
    problem = problem_from_counts(counts, topology.num_ranks, max_imbalance)
    match method:
        case "contiguous":
            plan = Plan.from_ranks(contiguous(*problem.shape), topology, trace, method=method)
        case "random":
            plan = Plan.from_ranks(random(*problem.shape, seed), topology, trace, method=method)
        case _:
            if method not in METHODS:
                known = ", ".join((*METHODS, "contiguous", "random"))
                raise InputError(f"--method {method}: no such method; give one of {known}")
            solution = solve(
                problem, topology, method=method, seed=seed, time_limit=time_limit, progress=progress
            )
            plan = _plan(solution, topology, trace)
    _check_cap(problem, plan)
    if max_imbalance is not None:
        plan = replace(plan, method=f"{plan.method}, max imbalance {max_imbalance:g}")
    return replace(plan, expected=evaluate(plan, trace))


def _check_cap(problem: PlacementProblem, plan: Plan) -> None:
    busiest = problem.part_loads(plan.rank_of_expert).max(axis=1)
    if (busiest > problem.max_load).any():
        assert plan.method in ("contiguous", "random")  # solvers keep the cap
        imbalance = busiest / (problem.load.sum(axis=1) / problem.num_parts)
        raise InputError(
            f"method {plan.method} has imbalance {imbalance.max():.4f} in MoE layer "
            f"{int(np.argmax(imbalance))}, over the max imbalance; use a method that solves, or a larger cap"
        )


def _plan(solution: Solution, topology: Topology, trace: RoutingTrace) -> Plan:
    return Plan.from_ranks(
        solution.assignment,
        topology,
        trace,
        method=solution.method,
        objective=solution.objective,
        lower_bound=solution.lower_bound,
        optimal=solution.optimal,
    )
