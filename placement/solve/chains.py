"""Chains of swaps: two parts exchange at most one expert each in every layer, all layers at once.

Experts that follow one another through the layers form tracks. Moving a whole track to another part pays
off only when its last layer has moved, which single swaps, each of which has to pay for itself, do not
see. Between two parts the best set of swaps is a shortest path: a state per layer (no swap, or one of
the (E/G)^2 swaps), a price per state, and a price per pair of states in adjacent layers.
"""

import numpy as np
from numpy.typing import NDArray

from exflow.placement.compiled import compiled
from exflow.placement.solve.problem import NORM, Assignment, PlacementProblem, Prices

IntArray = NDArray[np.int64]


def swap_chain(problem: PlacementProblem, assignment: Assignment, part: int, other: int) -> Assignment:
    """The best assignment [L, E] within one chain of swaps between two parts; never dearer than the given.

    Swaps that take a part over the cap, or to a replica of the same expert, are left out: from a feasible
    assignment comes a feasible one. Where other parts are nearer to one of the two than to the other it is
    left as it is: what a swap costs would hang on all of them.
    """
    distance = problem.distances
    others = np.delete(np.arange(problem.num_parts), [part, other])
    if not np.array_equal(distance[part, others], distance[other, others]):
        return assignment
    negligible = 1e-12 * (problem.inter.sum() + problem.intra.sum())  # less than this is rounding
    assignment = assignment.copy()
    loads = problem.part_loads(assignment)
    _apply_best_chain(
        problem.inter,
        problem.intra,
        problem.load,
        problem.max_load,
        problem.balance_price / distance[part, other],
        problem.replica_ids,
        np.ascontiguousarray(loads[:, [part, other]]),
        (loads[:, others] ** NORM).sum(axis=1),
        assignment,
        part,
        other,
        negligible,
    )
    return assignment


@compiled
def _apply_best_chain(
    inter: Prices,  # [L-1, E, E]
    intra: Prices,  # [L, E, E]
    load: Prices,  # [L, E]
    max_load: Prices,  # [L]
    balance_price: Prices,  # [L] in the unit of the prices
    replica_of: IntArray,  # [L, E]
    held: Prices,  # [L, 2] the load of both parts
    beside: Prices,  # [L] the sum of the NORM-th powers of what the other parts hold
    assignment: Assignment,  # changed in place
    part: int,
    other: int,
    negligible: float,
) -> None:
    """Apply the best chain. State 0 of a layer swaps nothing; state 1 + x * m + y swaps members x of `part`
    and y of `other`."""
    num_layers = assignment.shape[0]
    members = _members(assignment, part, other)
    size = members.shape[2]
    gain = np.zeros(1 + size * size)
    previous = np.zeros((num_layers, 1 + size * size), dtype=np.int64)
    for layer in range(num_layers):
        if layer > 0:
            gain, previous[layer] = _step(inter[layer - 1], members[layer - 1], members[layer], gain)
        _add_single_gains(inter, intra, members, layer, gain)
        _weigh(
            load[layer],
            max_load[layer],
            balance_price[layer],
            held[layer],
            beside[layer],
            members[layer],
            gain,
        )
        _leave_out_replicas(replica_of[layer], members[layer], gain)

    state = gain.argmax()
    if gain[state] <= negligible:
        return
    for layer in range(num_layers - 1, -1, -1):
        if state > 0:
            x, y = divmod(state - 1, size)
            assignment[layer, members[layer, 0, x]] = other
            assignment[layer, members[layer, 1, y]] = part
        state = previous[layer, state]


@compiled
def _members(assignment: Assignment, part: int, other: int) -> IntArray:
    """[L, 2, E/G]: the experts of both parts."""
    num_layers = assignment.shape[0]
    size = np.sum(assignment[0] == part)
    members = np.empty((num_layers, 2, size), dtype=np.int64)
    for layer in range(num_layers):
        members[layer, 0] = np.nonzero(assignment[layer] == part)[0]
        members[layer, 1] = np.nonzero(assignment[layer] == other)[0]
    return members


@compiled
def _add_single_gains(inter: Prices, intra: Prices, members: IntArray, layer: int, gain: Prices) -> None:
    """Add to every state of `layer` what it would gain if no other layer changed."""
    size = members.shape[2]
    pull = np.zeros((2, size))  # how much more each expert has to do with its own part than with the other
    for side in range(2):
        for x in range(size):
            expert = members[layer, side, x]
            for y in range(size):
                mate, stranger = members[layer, side, y], members[layer, 1 - side, y]
                pull[side, x] += intra[layer, expert, mate] - intra[layer, expert, stranger]
                if layer > 0:
                    mate, stranger = members[layer - 1, side, y], members[layer - 1, 1 - side, y]
                    pull[side, x] += inter[layer - 1, mate, expert] - inter[layer - 1, stranger, expert]
                if layer + 1 < members.shape[0]:
                    mate, stranger = members[layer + 1, side, y], members[layer + 1, 1 - side, y]
                    pull[side, x] += inter[layer, expert, mate] - inter[layer, expert, stranger]
    for x in range(size):
        for y in range(size):
            apart = intra[layer, members[layer, 0, x], members[layer, 1, y]]
            gain[1 + x * size + y] -= pull[0, x] + pull[1, y] + 2 * apart


@compiled
def _weigh(
    load: Prices,
    max_load: float,
    balance_price: float,
    held: Prices,
    beside: float,
    members: IntArray,
    gain: Prices,
) -> None:
    """Add what a swap gains in balance; bar the states whose swap takes one of the two parts over the cap."""
    size = members.shape[1]
    soft = _soft(held[0], held[1], beside)
    for x in range(size):
        for y in range(size):
            more = load[members[1, y]] - load[members[0, x]]
            heavier = max(held[0] + more, held[1] - more)
            gain[1 + x * size + y] += balance_price * (soft - _soft(held[0] + more, held[1] - more, beside))
            if heavier > max_load:
                gain[1 + x * size + y] = -np.inf


@compiled
def _soft(one: float, other: float, beside: float) -> float:
    """The soft maximum of two loads and others, whose powers sum to `beside`."""
    return float((one**NORM + other**NORM + beside) ** (1 / NORM))


@compiled
def _leave_out_replicas(replica_of: IntArray, members: IntArray, gain: Prices) -> None:
    """Bar the states whose swap takes an expert to another replica of it."""
    size = members.shape[1]
    for x in range(size):
        for y in range(size):
            for z in range(size):
                meets = z != y and replica_of[members[1, z]] == replica_of[members[0, x]]
                if meets or (z != x and replica_of[members[0, z]] == replica_of[members[1, y]]):
                    gain[1 + x * size + y] = -np.inf


@compiled
def _step(prices: Prices, before: IntArray, after: IntArray, gain: Prices) -> tuple[Prices, IntArray]:
    """The best gain of every state of a layer over the states of the layer before, and which one gives it.

    Where both layers swap, each expert of one ends beside the experts of the other that it had before: what
    both single gains counted as lost (or won) stays, so it is given back twice.
    """
    size = after.shape[1]
    best = np.full(len(gain), gain[0])
    previous = np.zeros(len(gain), dtype=np.int64)
    back = np.empty((2, size))
    for state in range(1, len(gain)):
        x, y = divmod(state - 1, size)
        for side in range(2):
            for z in range(size):
                expert = after[side, z]
                back[side, z] = 2 * (prices[before[0, x], expert] - prices[before[1, y], expert])
        if gain[state] > best[0]:
            best[0], previous[0] = gain[state], state
        target = 1
        for z in range(size):
            for w in range(size):
                total = gain[state] + back[0, z] - back[1, w]
                if total > best[target]:
                    best[target], previous[target] = total, state
                target += 1
    return best, previous
