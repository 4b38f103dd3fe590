"""Makes a plan from routing traces, by a solver or a baseline: the `exflow place` command."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.counts.affinity import AffinityCounts, count_affinity
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.replicas import equal_slots
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.baselines import contiguous, contiguous_plan, contiguous_slots, random
from exflow.placement.solve.descent import Stop
from exflow.placement.solve.load_only import load_only_layers, replica_counts
from exflow.placement.solve.objective import Objective, items_of, make_problem
from exflow.placement.solve.problem import Assignment, PlacementProblem
from exflow.placement.solve.refine import refine, subsampled
from exflow.placement.solve.solve import METHODS, Progress, Refine, Solution, solve
from exflow.placement.traffic.balance_owners import balance_owners
from exflow.placement.traffic.evaluate import evaluate
from exflow.placement.traffic.serving_table import spare_filled, tuned
from exflow.placement.traffic.traffic import follow, imbalance, imbalance_of, total
from exflow.profiling.merge import merge
from exflow.profiling.trace import RoutingTrace

_CLEARLY = 0.9  # of the contiguous placement's cost
_JUDGES = 20_000  # tokens
BASELINES = ("contiguous", "random", "load-only")


@dataclass(frozen=True)
class InUse:
    """A plan in use, of whose experts at most `max_moves` may move to another rank, all layers together."""

    plan: Plan
    max_moves: int

    def __post_init__(self) -> None:
        if self.max_moves < 0:
            raise InputError(f"max moves is {self.max_moves}; choose a number from 0 up")


@dataclass(frozen=True)
class Solving:
    """Solver options (see `solve`). `method` may also be a baseline: contiguous, random, load-only.

    stop: is asked before a further search begins; Ctrl-C ends the one that runs.
    """

    method: str = "auto"
    seed: int = 0
    time_limit: float = math.inf
    progress: Progress | None = None
    stop: Stop = lambda: False

    def __post_init__(self) -> None:
        if self.method not in METHODS + BASELINES:
            known = ", ".join(METHODS + BASELINES)
            raise InputError(f"method {self.method!r} is unknown; give one of {known}")


def place(
    traces: RoutingTrace | Sequence[RoutingTrace],
    topology: Topology,
    *,
    objective: Objective | None = None,
    solving: Solving | None = None,
    weights: Sequence[float] | None = None,
    redundant_experts: int = 0,
    in_use: InUse | None = None,
    counts: Sequence[AffinityCounts] | None = None,
) -> Plan:
    """Place the experts of the traces' model by the affinity that the traces show.

    weights            how much each trace counts; by default its tokens
    redundant_experts  slots of each layer beyond one for each expert; more are added until all ranks have
                       equally many. They hold further replicas of the experts with the most load
    in_use             start from a plan (its replicas stay as many as they are) and move few experts
    counts             of the traces, if they are known already

    The plan's expected figures are those of `evaluate` on all the traces together. Raises InputError if the
    traces are of different models or hold no tokens, the method is unknown or does not apply, or the cap on
    imbalance cannot be kept: it says the smallest that can.
    """
    traces = [traces] if isinstance(traces, RoutingTrace) else list(traces)
    objective, solving = objective or Objective(), solving or Solving()
    trace = merge(traces)
    counts = counts or [count_affinity(each) for each in traces]
    if in_use is not None:
        _check_in_use(in_use.plan, trace, topology)
        if solving.method in BASELINES:
            raise InputError(
                f"method {solving.method} places anew, whatever is in use; use a method that solves"
            )
        replicas = _replicas_in(in_use.plan)
    else:
        replicas = _replicas(counts, trace.experts_per_layer, topology.num_ranks, redundant_experts)
    shares = [float(each.num_tokens) for each in counts] if weights is None else list(weights)
    problem = make_problem(counts, shares, topology, objective, replicas)
    if in_use is not None:
        anchor = _assignment_in(in_use.plan)
        problem = replace(problem, anchor=anchor, max_moves=in_use.max_moves)
    if solving.method in BASELINES:
        slots = _baseline(solving, counts, topology, trace.experts_per_layer, replicas)
        plan = Plan.of_slots(slots, topology, trace, method=solving.method, strategy=objective.strategy)
        _check_cap(objective, plan, trace)
    else:
        anew = in_use is None and weights is None
        without = anew and problem.has_replicas and objective.max_imbalance is None
        without &= is_even(trace, topology)
        if without:  # solved twice, with replicas and without
            solving = replace(solving, time_limit=solving.time_limit / 2)
        refine = None if weights is not None else _refine(problem, trace, objective, topology, solving.seed)
        solution = solve(
            problem,
            topology,
            method=solving.method,
            seed=solving.seed,
            time_limit=solving.time_limit,
            progress=solving.progress,
            refine=refine,
        )
        plan = _plan_of(solution, replicas, topology, trace, objective)
        if anew and _may_be_beaten(problem, solution):
            rivals = [contiguous_plan(trace, topology, objective.strategy, plan.num_slots)]
            if problem.has_replicas and objective.max_imbalance is None:
                rivals += tuned(plan, trace)
            if without and not solving.stop():
                single = place(trace, topology, objective=objective, solving=solving, counts=counts)
                filled = spare_filled(single, trace, plan.num_slots)
                rivals += [filled, *tuned(filled, trace)]
            plan = _best(plan, rivals, objective, trace)
    if objective.owner_price:
        plan = balance_owners(plan, trace, objective.owner_price)
    return replace(plan, expected=evaluate(plan, trace))


def _may_be_beaten(problem: PlacementProblem, solution: Solution) -> bool:
    """True unless the prices of pairs alone show that the contiguous placement is far behind."""
    if problem.has_replicas:
        return True
    return solution.objective > _CLEARLY * problem.cost(contiguous(*problem.shape))


def _plan_of(
    solution: Solution,
    replicas: npt.NDArray[np.int64],
    topology: Topology,
    trace: RoutingTrace,
    objective: Objective,
) -> Plan:
    order = np.argsort(solution.assignment, axis=1, kind="stable")
    return Plan.of_slots(
        np.take_along_axis(items_of(replicas), order, axis=1),
        topology,
        trace,
        strategy=objective.strategy,
        method=solution.method,
        objective=solution.objective,
        lower_bound=solution.lower_bound,
        optimal=solution.optimal,
    )


def is_even(trace: RoutingTrace, topology: Topology) -> bool:
    """Whether the ranks can share the experts of each layer equally, without replicas."""
    return len(set(trace.experts_per_layer)) == 1 and trace.num_experts % topology.num_ranks == 0


def _best(plan: Plan, rivals: list[Plan], objective: Objective, trace: RoutingTrace) -> Plan:
    """The plan, or a rival that is better on the trace and allowed.

    The contiguous plan can be where routing is as good as random: pairs are not messages, and no pair knows
    of a sequence's next token. One without replicas can be where these break up what belongs together.
    """
    judged = subsampled(trace, _JUDGES / trace.num_tokens)
    best, (least, _) = plan, _true_cost(plan, objective, judged)
    for rival in rivals:
        cost, layers = _true_cost(rival, objective, judged)
        allowed = objective.max_imbalance is None or layers.max() <= objective.max_imbalance
        if allowed and cost < least:
            best, least = rival, cost
    return best


def _true_cost(
    plan: Plan, objective: Objective, trace: RoutingTrace
) -> tuple[float, npt.NDArray[np.float64]]:
    """Cost per token and layer, and the imbalance [L]. The cost counts messages, at the mean cost of links
    inside and between nodes, and imbalance."""
    topology, followed = plan.topology, follow(trace, plan, plan.group_size)
    traffic = total(followed, plan, plan.group_size)
    cost, node = topology.distance, topology.node_of_rank
    apart = node[:, None] != node
    near, far = (
        float(cost[links].mean()) if links.any() else 0.0
        for links in (~apart & ~np.eye(len(node), dtype=bool), apart)
    )
    within = traffic.per_token_layer(traffic.intra_node) * near
    between = traffic.per_token_layer(traffic.inter_node) * far
    layers = imbalance_of(followed.load.sum(axis=0))
    return within + between + objective.balance_price * float(layers.mean()), layers


def _replicas(
    counts: Sequence[AffinityCounts], experts_per_layer: Sequence[int], num_ranks: int, redundant: int
) -> npt.NDArray[np.int64]:
    """[L, E]: the number of replicas of each expert; 0 for an expert that the layer lacks."""
    if redundant < 0:
        raise InputError(f"redundant experts are {redundant}; choose a number from 0 up")
    most = max(experts_per_layer)
    num_slots = equal_slots(most + redundant, num_ranks)
    load = np.sum([each.load for each in counts], axis=0)
    replicas = np.zeros((len(load), most), dtype=np.int64)
    for layer, num_experts in enumerate(experts_per_layer):
        here = load[layer : layer + 1, :num_experts]
        replicas[layer, :num_experts] = replica_counts(here, num_slots, num_ranks)[0]
    return replicas


def _refine(
    problem: PlacementProblem, trace: RoutingTrace, objective: Objective, topology: Topology, seed: int
) -> Refine | None:
    """The descent on true messages; None for a problem that it cannot handle."""
    at_home = objective.strategy == Strategy.DISPATCH_COMBINE
    in_nodes = objective.strategy == Strategy.NODE_COHERENT
    if problem.has_replicas or in_nodes or (at_home and not problem.is_uniform):
        return None

    def refined(assignment: Assignment, stop: Stop) -> tuple[float, Assignment]:
        result = refine(problem, trace, assignment, fixed_home=at_home, seed=seed, stop=stop)
        return result.cost, result.assignment

    return refined


def _baseline(
    solving: Solving,
    counts: Sequence[AffinityCounts],
    topology: Topology,
    experts_per_layer: Sequence[int],
    replicas: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """[L, P] the expert in each slot: in order (spare slots begin again with expert 0), at random, or by
    load."""
    num_slots = int(replicas[0].sum())
    match solving.method:
        case "contiguous":
            return contiguous_slots(experts_per_layer, num_slots)
        case "random":
            ranks = random(len(replicas), num_slots, topology.num_ranks, solving.seed)
            return np.take_along_axis(items_of(replicas), np.argsort(ranks, axis=1, kind="stable"), axis=1)
        case _:
            load = np.sum([each.load for each in counts], axis=0)
            return load_only_layers(load, experts_per_layer, topology, num_slots)


def _replicas_in(plan: Plan) -> npt.NDArray[np.int64]:
    return np.stack([np.bincount(row, minlength=plan.num_experts) for row in plan.physical_to_logical_map])


def _assignment_in(plan: Plan) -> Assignment:
    """[L, P] the rank of each item, in the order of `items_of`; replicas on ranks of their own come first."""
    ranks = []
    for row in plan.physical_to_logical_map:
        expert, rank = row, np.arange(plan.num_slots) // plan.slots_per_rank
        on_rank = expert * plan.num_ranks + rank
        order = np.argsort(on_rank, kind="stable")
        first = np.searchsorted(on_rank[order], on_rank[order])
        again = np.empty_like(order)
        again[order] = np.arange(len(order)) - first  # how many of the expert are before it on its rank
        ranks.append(rank[np.lexsort((rank, again, expert))])
    return np.stack(ranks)


def _check_in_use(plan: Plan, trace: RoutingTrace, topology: Topology) -> None:
    plan.check_trace(trace)
    ours, theirs = (
        (topology.num_nodes, topology.gpus_per_node),
        (
            plan.topology.num_nodes,
            plan.topology.gpus_per_node,
        ),
    )
    if ours != theirs:
        raise InputError(f"the plan in use is for {plan.topology}, not for {topology}; give the same GPUs")


def _check_cap(objective: Objective, plan: Plan, trace: RoutingTrace) -> None:
    """Raise InputError if the plan of a baseline breaks the cap on imbalance, which baselines ignore."""
    layers = imbalance(trace, plan)
    if objective.max_imbalance is not None and layers.max() > objective.max_imbalance:
        raise InputError(
            f"method {plan.method} has imbalance {layers.max():.4f} in MoE layer {int(np.argmax(layers))}, "
            "over the max imbalance; use a method that solves, or a larger cap"
        )
