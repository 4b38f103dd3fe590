"""The compiled heart of the search: trials of swaps, each priced by a few look-ups.

A trial exchanges two experts of one layer. `pull` [L, G, E] holds, for every expert and part, the prices that
tie the expert to the part; with it a trial costs O(1) look-ups (O(G) where distances differ), and only an
accepted swap costs O(E).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exflow.placement.compiled import compiled
from exflow.placement.solve.problem import NORM, SQUARINGS, Assignment, PlacementProblem, Prices, one_hot

UNLIMITED = 1 << 62


class Fixed(NamedTuple):
    """A problem as the compiled code wants it (see PlacementProblem)."""

    inter: Prices
    inter_back: Prices  # [L-1, E, E] inter with its experts exchanged, for rows that lie together
    intra: Prices
    load: Prices
    max_load: Prices
    balance_price: Prices
    distance: Prices
    uniform: bool
    replica_of: Assignment
    has_replicas: bool
    anchor: Assignment
    max_moves: int


class State(NamedTuple):
    """An assignment and its derived arrays, which swaps update in place."""

    assignment: Assignment
    pull: Prices  # [L, G, E]
    held: Prices  # [L, G] the load of every part
    powers: Prices  # [L] the sum of their NORM-th powers
    moved: NDArray[np.int64]  # [1] experts that are not where the anchor has them


def fixed(problem: PlacementProblem) -> Fixed:
    return Fixed(
        inter=np.ascontiguousarray(problem.inter),
        inter_back=np.ascontiguousarray(problem.inter.transpose(0, 2, 1)),
        intra=np.ascontiguousarray(problem.intra),
        load=problem.load,
        max_load=problem.max_load,
        balance_price=problem.balance_price,
        distance=problem.distances,
        uniform=problem.is_uniform,
        replica_of=np.ascontiguousarray(problem.replica_ids),
        has_replicas=problem.has_replicas,
        anchor=problem.replica_ids if problem.anchor is None else problem.anchor,
        max_moves=UNLIMITED if problem.max_moves is None else problem.max_moves,
    )


def state(problem: PlacementProblem, assignment: Assignment) -> State:
    """The state of a copy of `assignment`."""
    held = problem.part_loads(assignment)
    return State(
        np.ascontiguousarray(assignment).copy(),
        pulls(problem, assignment),
        held,
        (held**NORM).sum(axis=1),
        np.array([problem.moves(assignment)]),
    )


def pulls(problem: PlacementProblem, assignment: Assignment) -> Prices:
    """[L, G, E]: the sum of the prices between an expert and those on a part, in its layer and beside it."""
    hot = one_hot(assignment, problem.num_parts)
    pull = problem.intra @ hot
    pull[:-1] += problem.inter @ hot[1:]
    pull[1:] += problem.inter.transpose(0, 2, 1) @ hot[:-1]
    return np.ascontiguousarray(pull.transpose(0, 2, 1))


@compiled
def try_swaps(fixed: Fixed, state: State, temperature: float, passes: int, rng: np.random.Generator) -> None:
    """Metropolis: in every pass each expert is tried against a random one of its layer."""
    num_layers, num_experts = state.assignment.shape
    for _ in range(passes):
        for layer in range(num_layers):
            for e in range(num_experts):
                f = int(rng.random() * num_experts)
                if not is_allowed(fixed, state, layer, e, f):
                    continue
                price = swap_price(fixed, state, layer, e, f) + balance_change(fixed, state, layer, e, f)
                if price > 0 and rng.random() >= math.exp(-price / temperature):
                    continue
                apply_swap(fixed, state, layer, e, f)


@compiled
def sample_prices(fixed: Fixed, state: State, passes: int, rng: np.random.Generator) -> Prices:
    """[passes, L, E]: prices of random swaps, as `passes` passes would try them without limits; 0 for a swap
    inside one part."""
    num_layers, num_experts = state.assignment.shape
    prices = np.zeros((passes, num_layers, num_experts))
    for i in range(passes):
        for layer in range(num_layers):
            for e in range(num_experts):
                f = int(rng.random() * num_experts)
                if state.assignment[layer, e] != state.assignment[layer, f]:
                    prices[i, layer, e] = swap_price(fixed, state, layer, e, f)
                    prices[i, layer, e] += balance_change(fixed, state, layer, e, f)
    return prices


@compiled
def is_allowed(fixed: Fixed, state: State, layer: int, e: int, f: int) -> bool:
    """True if e and f are on different parts and may change places."""
    p, q = state.assignment[layer, e], state.assignment[layer, f]
    if p == q:
        return False
    more, most = fixed.load[layer, f] - fixed.load[layer, e], fixed.max_load[layer]
    if state.held[layer, p] + more > most or state.held[layer, q] - more > most:
        return False
    if fixed.has_replicas and _would_meet_a_replica(fixed, state, layer, e, f):
        return False
    return bool(state.moved[0] + _more_moves(fixed, layer, e, f, p, q) <= fixed.max_moves)


@compiled
def swap_price(fixed: Fixed, state: State, layer: int, e: int, f: int) -> float:
    """Change of the cost, balance aside, by exchanging e and f, which are on different parts."""
    p, q = state.assignment[layer, e], state.assignment[layer, f]
    pull, within = state.pull[layer], fixed.intra[layer, e, f]
    if fixed.uniform:
        return float(pull[p, e] - pull[q, e] + pull[q, f] - pull[p, f] + 2 * within)
    price = 2 * fixed.distance[p, q] * within
    for part in range(pull.shape[0]):
        price += (fixed.distance[q, part] - fixed.distance[p, part]) * (pull[part, e] - pull[part, f])
    return float(price)


@compiled
def balance_change(fixed: Fixed, state: State, layer: int, e: int, f: int) -> float:
    """Change of the price of the layer's soft maximum of loads by exchanging e and f."""
    price = fixed.balance_price[layer]
    if price == 0:
        return 0.0
    held, before = state.held[layer], state.powers[layer]
    p, q = held[state.assignment[layer, e]], held[state.assignment[layer, f]]
    more = fixed.load[layer, f] - fixed.load[layer, e]
    after = before - _power(p) - _power(q) + _power(p + more) + _power(q - more)
    return float(price * (_root(after) - _root(before)))


@compiled
def apply_swap(fixed: Fixed, state: State, layer: int, e: int, f: int) -> None:
    parts, pull = state.assignment[layer], state.pull
    p, q = parts[e], parts[f]
    more = fixed.load[layer, f] - fixed.load[layer, e]
    state.moved[0] += _more_moves(fixed, layer, e, f, p, q)
    parts[e], parts[f] = q, p
    state.held[layer, p] += more
    state.held[layer, q] -= more
    state.powers[layer] = (state.held[layer] ** NORM).sum()
    _move_pull(fixed.intra[layer, e], fixed.intra[layer, f], pull[layer, p], pull[layer, q])
    if layer > 0:
        back = fixed.inter_back[layer - 1]
        _move_pull(back[e], back[f], pull[layer - 1, p], pull[layer - 1, q])
    if layer + 1 < len(pull):
        ahead = fixed.inter[layer]
        _move_pull(ahead[e], ahead[f], pull[layer + 1, p], pull[layer + 1, q])


@compiled
def _power(load: float) -> float:
    """load ** NORM, by squaring."""
    for _ in range(SQUARINGS):
        load *= load
    return load


@compiled
def _root(power: float) -> float:
    for _ in range(SQUARINGS):
        power = math.sqrt(power)
    return power


@compiled
def _would_meet_a_replica(fixed: Fixed, state: State, layer: int, e: int, f: int) -> bool:
    of, parts = fixed.replica_of[layer], state.assignment[layer]
    if of[e] == of[f]:
        return True  # changes nothing
    for other in range(len(of)):
        if of[other] == of[e] and parts[other] == parts[f]:
            return True
        if of[other] == of[f] and parts[other] == parts[e]:
            return True
    return False


@compiled
def _more_moves(fixed: Fixed, layer: int, e: int, f: int, p: int, q: int) -> int:
    """Change of the number of moved experts by exchanging e (on p) and f (on q)."""
    if fixed.max_moves == UNLIMITED:
        return 0
    home_e, home_f = fixed.anchor[layer, e], fixed.anchor[layer, f]
    return int(q != home_e) - int(p != home_e) + int(p != home_f) - int(q != home_f)


@compiled
def _move_pull(of_e: Prices, of_f: Prices, pull_p: Prices, pull_q: Prices) -> None:
    """Update the pull of parts p and q after e has left p for q, and f the other way."""
    for expert in range(len(of_e)):
        change = of_f[expert] - of_e[expert]
        pull_p[expert] += change
        pull_q[expert] -= change
