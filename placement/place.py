"""From a trace to a plan: the `exflow place` command, baselines included."""

import math
from dataclasses import replace

from exflow.errors import InputError
from exflow.placement.affinity import count_affinity
from exflow.placement.baselines import contiguous, random
from exflow.placement.evaluate import evaluate
from exflow.placement.plan import Plan
from exflow.placement.problem import problem_from_counts
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
    progress: Progress | None = None,
) -> Plan:
    """Place the experts of the trace's model by the affinity that the trace shows.

    method: "contiguous" or "random" for a baseline, else as for `solve`, as are the other arguments. The
    plan's expected figures are those of `evaluate` on this trace. Raises InputError if the ranks cannot share
    the experts evenly or the trace holds no tokens.
    """
    shape = (trace.num_layers, trace.num_experts, topology.num_ranks)
    match method:
        case "contiguous":
            plan = Plan.from_ranks(contiguous(*shape), topology, trace, method=method)
        case "random":
            plan = Plan.from_ranks(random(*shape, seed), topology, trace, method=method)
        case _:
            if method not in METHODS:
                known = ", ".join((*METHODS, "contiguous", "random"))
                raise InputError(f"--method {method}: no such method; give one of {known}")
            problem = problem_from_counts(count_affinity(trace), topology.num_ranks)
            solution = solve(
                problem, topology, method=method, seed=seed, time_limit=time_limit, progress=progress
            )
            plan = _plan(solution, topology, trace)
    return replace(plan, expected=evaluate(plan, trace))


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
