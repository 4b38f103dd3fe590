"""Descent on the messages themselves: the last step of a search, token by token.

The search minimises sums over pairs of experts; what is sent depends on whole sets, and on the owner's rule.
Here swaps are judged by what they do to every token that selects one of the two experts. That is some
thousand times dearer, so only the few swaps of each expert are tried that pairs say are cheapest.

Shapes: T tokens, L MoE layers, K = top_k, E experts, G ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exflow.placement.compiled import compiled
from exflow.placement.counts.owners import next_owner_table
from exflow.placement.solve.problem import Assignment, PlacementProblem, Prices, one_hot
from exflow.placement.solve.swaps import (
    Fixed,
    State,
    apply_swap,
    balance_change,
    fixed,
    is_allowed,
    state,
    swap_price,
)
from exflow.profiling.merge import of_sequences
from exflow.profiling.sequences import consecutive_rows
from exflow.profiling.trace import RoutingTrace

IntArray = NDArray[np.integer]
_PARTNERS = 4  # swaps tried for each expert in a round; twice as many find no more
_ROUNDS = 8  # three to six do it
_MOST_WORK = 10**8  # tokens visited in a round, about five seconds; longer traces are subsampled


class Tokens(NamedTuple):
    """A trace as the compiled code wants it."""

    experts: IntArray  # [T, L, K]
    rows: NDArray[np.int32]  # [L, T * K] the tokens that select expert 0 of the layer, then expert 1, ...
    begin: NDArray[np.int64]  # [L, E + 1] where those of each expert begin
    owner: NDArray[np.int16]  # [T, L + 1] the owner before each layer, and after the last; kept up to date
    before: NDArray[np.int64]  # [T] the row before in the same sequence, or -1 - home for its first
    fixed_home: bool  # dispatch-combine: the owner is home, which is any rank alike


@dataclass(frozen=True)
class Refined:
    assignment: Assignment  # [L, E]
    messages: float  # cost of the messages of a token in all layers
    cost: float  # and of imbalance


def refine(
    problem: PlacementProblem,
    trace: RoutingTrace,
    assignment: Assignment,
    *,
    fixed_home: bool = False,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Refined:
    """An assignment that is feasible if `assignment` [L, E] is, and never dearer on the trace's true
    messages.

    The cost is that of the coherent strategy, or with `fixed_home` of dispatch-combine; a message costs its
    distance. There must be no replicas. `stop` is asked now and then and ends the descent early.
    """
    assert not problem.has_replicas
    work = 2 * _PARTNERS * trace.num_tokens * trace.num_layers * trace.top_k
    trace = subsampled(trace, _MOST_WORK / work)
    tokens = _index(trace, problem, fixed_home)
    best, rng = _judge(problem, tokens, trace, assignment), np.random.default_rng(seed)
    for _ in range(_ROUNDS):
        if stop():
            break
        table = _owner_table(problem, trace, best.assignment)
        now, prices = state(problem, best.assignment), fixed(problem)
        _follow_owners(tokens, now.assignment, table)
        for layer in rng.permutation(problem.num_layers):
            if stop():
                break
            order = rng.permutation(problem.num_experts)
            _refine_layer(prices, now, tokens, table, int(layer), order, 1 / len(tokens.experts))
        found = _judge(problem, tokens, trace, now.assignment)
        if found.cost >= best.cost * (1 - 1e-5):
            break
        best = found
    return best


def subsampled(trace: RoutingTrace, share: float) -> RoutingTrace:
    """About this share of the trace's sequences, evenly spread and numbered anew; all of them from 1 up."""
    if share >= 1:
        return trace
    keep = np.floor(np.arange(len(np.unique(trace.sequence)) + 1) * share)
    kept = np.flatnonzero(keep[1:] > keep[:-1])
    return of_sequences(trace, kept) if len(kept) else trace


def _index(trace: RoutingTrace, problem: PlacementProblem, fixed_home: bool) -> Tokens:
    experts = np.asarray(trace.experts)
    num_tokens, num_layers, top_k = experts.shape
    rows = np.empty((num_layers, num_tokens * top_k), dtype=np.int32)
    begin = np.empty((num_layers, problem.num_experts + 1), dtype=np.int64)
    for layer in range(num_layers):
        chosen = experts[:, layer].ravel()
        order = np.argsort(chosen, kind="stable")
        rows[layer] = order // top_k
        begin[layer] = np.searchsorted(chosen[order], np.arange(problem.num_experts + 1))
    before = -1 - trace.sequence.astype(np.int64) % problem.num_parts
    earlier, later = consecutive_rows(trace.sequence)
    before[later] = earlier
    owner = np.zeros((num_tokens, num_layers + 1), dtype=np.int16)
    return Tokens(experts, rows, begin, owner, before, fixed_home)


def _owner_table(problem: PlacementProblem, trace: RoutingTrace, assignment: Assignment) -> NDArray[np.int16]:
    return next_owner_table(trace, one_hot(assignment, problem.num_parts) > 0)


def _judge(problem: PlacementProblem, tokens: Tokens, trace: RoutingTrace, assignment: Assignment) -> Refined:
    _follow_owners(tokens, assignment, _owner_table(problem, trace, assignment))
    messages = _message_cost(tokens, assignment, problem.distances) / len(tokens.experts)
    balance = problem.imbalance_cost(problem.part_loads(assignment))
    return Refined(assignment, messages, messages + balance)


@compiled
def _follow_owners(tokens: Tokens, assignment: Assignment, table: NDArray[np.int16]) -> None:
    """Fill in `tokens.owner`: before its first layer the row before left it there, or it is at home."""
    num_tokens, num_layers, _ = tokens.experts.shape
    for token in range(num_tokens):
        before = tokens.before[token]
        tokens.owner[token, 0] = tokens.owner[before, num_layers] if before >= 0 else -1 - before
        for layer in range(num_layers):
            tokens.owner[token, layer + 1] = _choose(
                tokens.experts[token, layer], assignment[layer], table[layer]
            )


@compiled
def _choose(chosen: IntArray, parts: IntArray, table: NDArray[np.int16]) -> int:
    """The part among the chosen experts' that has the largest score, the lowest of equals (see
    `traffic.choose_owner`)."""
    best, best_score = -1, -1
    for expert in chosen:
        part = parts[expert]
        score = _score(chosen, part, table)
        if score > best_score or (score == best_score and part < best):
            best, best_score = part, score
    return best


@compiled
def _score(chosen: IntArray, part: int, table: NDArray[np.int16]) -> int:
    score = 0
    for expert in chosen:
        score += table[expert, part]
    return score


@compiled
def _star(chosen: IntArray, parts: IntArray, owner: int, distance: Prices) -> float:
    """The messages between `owner` and the parts of the chosen experts, each once."""
    cost = 0.0
    for i in range(len(chosen)):
        part = parts[chosen[i]]
        fresh = True
        for j in range(i):
            if parts[chosen[j]] == part:
                fresh = False
        if fresh:
            cost += distance[owner, part]
    return cost


@compiled
def _message_cost(tokens: Tokens, assignment: Assignment, distance: Prices) -> float:
    """Cost of all messages, over tokens and layers: dispatch from the owner before a layer, return to the
    owner after it."""
    num_tokens, num_layers, _ = tokens.experts.shape
    cost = 0.0
    for token in range(num_tokens):
        for layer in range(num_layers):
            chosen, parts = tokens.experts[token, layer], assignment[layer]
            before, after = tokens.owner[token, layer], tokens.owner[token, layer + 1]
            there, back = _star(chosen, parts, before, distance), _star(chosen, parts, after, distance)
            if tokens.fixed_home:  # the mean over all homes: `after` is one of the hosts, at a distance of 1
                cost += 2 * (back + 1) * (1 - 1 / len(distance))
            else:
                cost += there + back
    return cost


@compiled
def _refine_layer(
    fixed: Fixed,
    state: State,
    tokens: Tokens,
    table: NDArray[np.int16],  # [L, E, G]
    layer: int,
    order: IntArray,  # [E]
    per_token: float,
) -> None:
    """Try each expert of a layer, in the given order, with the partners that pair prices find cheapest."""
    num_experts = len(order)
    price = np.empty(num_experts)
    for e in order:
        for f in range(num_experts):
            price[f] = np.inf
            if is_allowed(fixed, state, layer, e, f):
                price[f] = swap_price(fixed, state, layer, e, f) + balance_change(fixed, state, layer, e, f)
        for _ in range(_PARTNERS):
            f = int(price.argmin())
            if price[f] == np.inf:
                break
            price[f] = np.inf
            change = balance_change(fixed, state, layer, e, f)
            p, q = state.assignment[layer, e], state.assignment[layer, f]
            state.assignment[layer, e], state.assignment[layer, f] = q, p
            change += per_token * (
                _change(tokens, state.assignment, table, fixed.distance, layer, e, f, p, q)
                + _change(tokens, state.assignment, table, fixed.distance, layer, f, e, q, p)
            )
            state.assignment[layer, e], state.assignment[layer, f] = p, q
            if change < -1e-9:
                apply_swap(fixed, state, layer, e, f)
                if layer + 1 < len(state.assignment):
                    _choose_again(tokens, state.assignment, table, layer, e)
                    _choose_again(tokens, state.assignment, table, layer, f)
                break


@compiled
def _change(
    tokens: Tokens,
    assignment: Assignment,  # with e on q already
    table: NDArray[np.int16],
    distance: Prices,
    layer: int,
    e: int,
    f: int,
    p: int,
    q: int,
) -> float:
    """Change of the message cost after e has left part p for q, over the tokens that select e and not f."""
    parts, last = assignment[layer], layer + 1 == len(assignment)
    change = 0.0
    for i in range(tokens.begin[layer, e], tokens.begin[layer, e + 1]):
        token = tokens.rows[layer, i]
        chosen = tokens.experts[token, layer]
        has_f, on_p, on_q = False, False, False
        for expert in chosen:
            if expert == f:
                has_f = True
            elif expert != e:
                on_p |= parts[expert] == p
                on_q |= parts[expert] == q
        if has_f or (on_p and on_q):
            continue
        if tokens.fixed_home:
            change += 2 * (int(not on_q) - int(not on_p)) * (1 - 1 / len(distance))
            continue
        before, after = tokens.owner[token, layer], tokens.owner[token, layer + 1]
        if not on_q:
            change += distance[before, q] + distance[after, q]
        if not on_p:
            change -= distance[before, p] + distance[after, p]
        if last:
            continue
        if after != p or on_p:  # the owner is still a host: only a new host can be a better one
            if on_q:
                continue
            gain = _score(chosen, q, table[layer]) - _score(chosen, after, table[layer])
            if gain < 0 or (gain == 0 and q > after):
                continue
            owner = q
        else:
            owner = _choose(chosen, parts, table[layer])
        ahead, places = tokens.experts[token, layer + 1], assignment[layer + 1]
        change += _star(chosen, parts, owner, distance) - _star(chosen, parts, after, distance)
        change += _star(ahead, places, owner, distance) - _star(ahead, places, after, distance)
    return change


@compiled
def _choose_again(
    tokens: Tokens, assignment: Assignment, table: NDArray[np.int16], layer: int, expert: int
) -> None:
    """Bring the owners after `layer` up to date for the tokens that select `expert`."""
    for i in range(tokens.begin[layer, expert], tokens.begin[layer, expert + 1]):
        token = tokens.rows[layer, i]
        chosen = tokens.experts[token, layer]
        tokens.owner[token, layer + 1] = _choose(chosen, assignment[layer], table[layer])
