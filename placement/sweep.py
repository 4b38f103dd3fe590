"""Descent: take an assignment to one that no large step improves. Every step is exact in what it may change.

Three steps, each of which leaves the cost lower or the assignment as it was, and a feasible one feasible:
`align_layers` renames the parts of whole layers, `replace_layer` places one layer anew beside its neighbours,
`swap_chain` exchanges experts between two parts in all layers at once.
"""

from collections.abc import Callable
from itertools import chain, combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

from exflow.placement.chains import swap_chain
from exflow.placement.problem import Assignment, PlacementProblem, Prices

Stop = Callable[[], bool]


def sweep(problem: PlacementProblem, assignment: Assignment, stop: Stop = lambda: False) -> Assignment:
    """Repeat the three steps until none lowers the cost. `stop` is asked between steps and ends it early."""
    cost = problem.cost(assignment)
    while not stop():
        improved = _sweep_once(problem, assignment, stop)
        improved_cost = problem.cost(improved)
        if improved_cost >= cost:
            break
        assignment, cost = improved, improved_cost
    return assignment


def _sweep_once(problem: PlacementProblem, assignment: Assignment, stop: Stop) -> Assignment:
    assignment = align_layers(problem, assignment)
    forward, backward = range(problem.num_layers), reversed(range(problem.num_layers))
    for layer in chain(forward, backward):
        if stop():
            return assignment
        assignment = replace_layer(problem, assignment, layer)
    for part, other in combinations(range(problem.num_parts), 2):
        if stop():
            return assignment
        assignment = swap_chain(problem, assignment, part, other)
    return assignment


def align_layers(problem: PlacementProblem, assignment: Assignment) -> Assignment:
    """Rename the parts of each layer so that most is kept together: the best of all renamings, exactly.

    Names do not matter inside a layer, so each adjacent pair is one assignment problem of size G.
    """
    hot = one_hot(assignment, problem.num_parts)
    together = hot[:-1].transpose(0, 2, 1) @ problem.inter @ hot[1:]  # [L-1, G, G], by old names
    name = np.arange(problem.num_parts)
    aligned = [assignment[0]]
    for layer, kept in enumerate(together):
        old_name, partner = linear_sum_assignment(kept, maximize=True)
        name[partner] = name[old_name]
        aligned.append(name[assignment[layer + 1]])
    return np.stack(aligned)


def replace_layer(problem: PlacementProblem, assignment: Assignment, layer: int) -> Assignment:
    """Place one layer anew, all others fixed: an assignment of its experts to the G * E/G places.

    Exact without intra prices; with them each expert is priced against where its mates are now, and the
    result is taken only if it is cheaper in truth, and no part is over the cap.
    """
    pull = np.zeros((problem.num_experts, problem.num_parts))
    if layer > 0:
        pull += problem.inter[layer - 1].T @ one_hot(assignment[layer - 1], problem.num_parts)
    if layer + 1 < problem.num_layers:
        pull += problem.inter[layer] @ one_hot(assignment[layer + 1], problem.num_parts)
    pull_within = problem.intra[layer] @ one_hot(assignment[layer], problem.num_parts)
    places = np.repeat(np.arange(problem.num_parts), problem.experts_per_part)
    _, place = linear_sum_assignment((pull + pull_within)[:, places], maximize=True)

    def kept(parts: Assignment) -> float:
        hot = one_hot(parts, problem.num_parts)
        return float((hot * (pull + problem.intra[layer] @ hot / 2)).sum())

    held = np.bincount(places[place], problem.load[layer], problem.num_parts)
    if held.max() > problem.max_load[layer] or kept(places[place]) <= kept(assignment[layer]):
        return assignment
    replaced = assignment.copy()
    replaced[layer] = places[place]
    return replaced


def one_hot(assignment: Assignment, num_parts: int) -> Prices:
    """[..., E, G] float64: 1 where the expert is on the part."""
    return np.asarray(assignment[..., None] == np.arange(num_parts), dtype=np.float64)
