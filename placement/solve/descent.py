"""Descent: improves an assignment by large steps until none lowers the cost. Each step is exact in what it
changes.

Three steps, each of which leaves the cost lower or the assignment as it was, and a feasible one feasible:
`align_layers` renames the parts of whole layers, `replace_layer` places one layer anew beside its neighbours,
`swap_chain` exchanges experts between two parts in all layers at once.
"""

from collections.abc import Callable
from itertools import chain, combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

from exflow.placement.solve.chains import swap_chain
from exflow.placement.solve.problem import Assignment, PlacementProblem, one_hot, soft_maximum

Stop = Callable[[], bool]


def sweep(problem: PlacementProblem, assignment: Assignment, stop: Stop = lambda: False) -> Assignment:
    """Repeat the three steps until none lowers the cost. `stop` is asked between steps and ends it early.

    The steps move many experts at once: under a limit on moves the assignment is returned as it is.
    """
    if problem.anchor is not None or stop():
        return assignment
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
    """Rename the parts of each layer so that it is nearest to the layer before; never dearer than before.

    With equal distances names do not matter inside a layer, so this is exact: the best of all renamings. With
    others a layer's own distances change as well, and what comes out is taken only if it is cheaper.
    """
    if problem.anchor is not None:
        return assignment
    hot = one_hot(assignment, problem.num_parts)
    together = hot[:-1].transpose(0, 2, 1) @ problem.inter @ hot[1:]  # [L-1, G, G], by old names
    name = np.arange(problem.num_parts)
    aligned = [assignment[0]]
    for layer, flow in enumerate(together):
        price = problem.distances[:, name] @ flow  # of calling a part of the next layer so
        new_name, part = linear_sum_assignment(price)
        name = np.empty_like(name)
        name[part] = new_name
        aligned.append(name[assignment[layer + 1]])
    renamed = np.stack(aligned)
    if problem.is_uniform or problem.cost(renamed) < problem.cost(assignment):
        return renamed
    return assignment


def replace_layer(problem: PlacementProblem, assignment: Assignment, layer: int) -> Assignment:
    """Place one layer anew, all others fixed: an assignment of its experts to the G * E/G places.

    Exact without intra prices and price of imbalance; with them each expert is priced against where its mates
    are now, and the result is taken only if it is feasible and cheaper in truth.
    """
    near = np.zeros((problem.num_experts, problem.num_parts))
    if layer > 0:
        near += problem.inter[layer - 1].T @ one_hot(assignment[layer - 1], problem.num_parts)
    if layer + 1 < problem.num_layers:
        near += problem.inter[layer] @ one_hot(assignment[layer + 1], problem.num_parts)
    outside = near @ problem.distances  # [E, G] what an expert pays to the layers beside
    within = problem.intra[layer] @ one_hot(assignment[layer], problem.num_parts) @ problem.distances
    places = np.repeat(np.arange(problem.num_parts), problem.experts_per_part)
    _, place = linear_sum_assignment((outside + within)[:, places])

    def price(parts: Assignment) -> float:
        hot = one_hot(parts, problem.num_parts)
        pairs = hot * (outside + problem.intra[layer] @ hot @ problem.distances / 2)
        return float(pairs.sum() + problem.balance_price[layer] * soft_maximum(problem.load[layer] @ hot))

    replaced = assignment.copy()
    replaced[layer] = places[place]
    if price(replaced[layer]) >= price(assignment[layer]) or not problem.is_feasible(replaced):
        return assignment
    return replaced
