"""Annealed moves of the replicas of one layer, judged by the time that everybody waits for (see time_swaps).

A token belongs to a class, its owner and its turn, and for each expert a table names the rank that serves the
class. All moves are changes of that table, one (class, expert) at a time; so what the ranks receive and
compute is counted token by token. A move that is not taken is taken back the same way.

Shapes: T tokens, K = top_k, E experts, G ranks, S slots of a rank, C = G * W classes of W turns, I starts.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exflow.placement.compiled import compiled
from exflow.placement.plan.replicas import choose_replicas
from exflow.placement.solve.time_swaps import LEVELS, cost_us

IntArray = npt.NDArray[np.integer]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
EMPTY = -1  # a slot without an expert
HOT, COLD = 0.1, 0.0005  # temperatures, times the largest change of a move

_choose_replicas = compiled(choose_replicas)


class State(NamedTuple):
    """A layer's replicas, and what follows from them."""

    slots: Counts  # [G, S] experts, or EMPTY
    hosts: Counts  # [E, G] 1 where rank g has expert e
    table: Counts  # [E, C] the rank that serves
    served: Counts  # [E, G] number of classes that rank g serves
    rows: Counts  # the tokens of class c that choose expert e are ...
    begin: Counts  # ... rows[begin[e * C + c] : begin[e * C + c + 1]]
    on_rank: npt.NDArray[np.uint8]  # [T, G] experts of a token that rank g serves
    on_node: npt.NDArray[np.uint8]  # [T, N]
    received: Counts  # [G] tokens of other owners that rank g serves
    received_far: Counts  # [G] tokens of other nodes' owners that come over the link of rank g
    load: Floats  # [G] work


class Rule(NamedTuple):
    """How the serving replica is chosen: `free` is by a table of our own, which is searched too."""

    free: bool
    nearest: bool
    turns: int
    per_node: int


@compiled
def anneal_replicas(
    chosen: IntArray,  # [T, K]
    slots: Counts,  # [I, G, S]
    tables: Counts,  # [I, E, C]
    rule: Rule,
    prices: tuple[float, float, float, float, float],
    scale: float,  # from tokens of the trace to those of a batch
    work: Floats,  # [E, C + 1] of an expert whose rank serves so many classes
    trials: int,  # moves at each temperature
    seed: int,
) -> tuple[Counts, Counts]:
    """The best slots [G, S] and table [E, C] that annealed moves find from the best of the starts."""
    np.random.seed(seed)  # noqa: NPY002 - numba's generator
    best_cost, best = np.inf, 0
    for start in range(len(slots)):
        state = state_of(chosen, slots[start], tables[start], rule, work)
        cost = cost_us(state.received, state.received_far, state.load, prices, scale)
        if cost < best_cost:
            best_cost, best = cost, start
    state = state_of(chosen, slots[best], tables[best], rule, work)
    best_slots, best_table = state.slots.copy(), state.table.copy()
    ranks, per_rank = state.slots.shape
    journal = np.empty((4 * state.table.shape[1] + 4, 3), dtype=np.int64)
    cost, deviation = best_cost, 0.0
    for level in range(LEVELS + 1):  # the first is to learn how much moves change
        temperature = deviation * HOT * (COLD / HOT) ** ((level - 1) / (LEVELS - 1))
        for _ in range(trials):
            p, i = np.random.randint(ranks), np.random.randint(per_rank)  # noqa: NPY002
            q, j = np.random.randint(ranks), np.random.randint(per_rank)  # noqa: NPY002
            before, other = state.slots[p, i], state.slots[q, j]
            noted = _propose(state, p, i, q, j, rule, work, journal)
            if noted < 0:
                continue
            new = cost_us(state.received, state.received_far, state.load, prices, scale)
            if level == 0:
                deviation = max(deviation, abs(new - cost))
                accepted = False
            else:
                accepted = new <= cost or np.random.random() < math.exp((cost - new) / temperature)  # noqa: NPY002
            if not accepted:
                for entry in range(noted - 1, -1, -1):
                    _serve(state, journal[entry, 0], journal[entry, 1], journal[entry, 2], rule, work)
                _put(state, q, j, EMPTY)
                _put(state, p, i, before)
                _put(state, q, j, other)
                continue
            cost = new
            if cost < best_cost - 1e-9:
                best_cost = cost
                best_slots[:], best_table[:] = state.slots, state.table
        if level == 0 and deviation == 0.0:
            break
    return best_slots, best_table


@compiled
def state_of(chosen: IntArray, slots: Counts, table: Counts, rule: Rule, work: Floats) -> State:
    """The state in which `slots` [G, S] hold the experts, and `table` [E, C] says who serves."""
    ranks, num_classes = len(slots), table.shape[1]
    rows, begin = _rows_by_class(chosen, table, rule.turns)
    state = State(
        np.full(slots.shape, EMPTY, dtype=np.int64),
        np.zeros((len(table), ranks), dtype=np.int64),
        table.copy(),
        np.zeros((len(table), ranks), dtype=np.int64),
        rows,
        begin,
        np.zeros((len(chosen), ranks), dtype=np.uint8),
        np.zeros((len(chosen), ranks // rule.per_node), dtype=np.uint8),
        np.zeros(ranks, dtype=np.int64),
        np.zeros(ranks, dtype=np.int64),
        np.zeros(ranks),
    )
    for rank in range(ranks):
        for i in range(slots.shape[1]):
            if slots[rank, i] != EMPTY and not state.hosts[slots[rank, i], rank]:
                _put(state, rank, i, slots[rank, i])
    for expert in range(len(table)):
        for c in range(num_classes):
            _count(state, expert, c, table[expert, c], 1, rule, work)
    return state


@compiled
def _rows_by_class(chosen: IntArray, table: Counts, turns: int) -> tuple[Counts, Counts]:
    """The fields rows and begin of a state; as in drawn batches, token t belongs to rank t % G."""
    num_classes = table.shape[1]
    ranks, top_k = num_classes // turns, chosen.shape[1]
    begin = np.zeros(len(table) * num_classes + 1, dtype=np.int64)
    for count in range(2):
        if count == 1:
            for place in range(len(begin) - 1):
                begin[place + 1] += begin[place]
            rows, at = np.empty(chosen.size, dtype=np.int64), begin[:-1].copy()
        for token in range(len(chosen)):
            for choice in range(top_k):
                turn = (token // ranks * top_k + choice) % turns
                place = chosen[token, choice] * num_classes + token % ranks * turns + turn
                if count == 0:
                    begin[place + 1] += 1
                else:
                    rows[at[place]] = token
                    at[place] += 1
    return rows, begin


@compiled
def _put(state: State, rank: int, i: int, expert: int) -> None:
    """Replace the expert in slot i of a rank, which no class is served by any more."""
    before = state.slots[rank, i]
    if before != EMPTY:
        state.hosts[before, rank] = 0
    state.slots[rank, i] = expert
    if expert != EMPTY:
        state.hosts[expert, rank] = 1


@compiled
def _serve(state: State, expert: int, c: int, rank: int, rule: Rule, work: Floats) -> None:
    """Let `rank` serve a class."""
    _count(state, expert, c, state.table[expert, c], -1, rule, work)
    _count(state, expert, c, rank, 1, rule, work)
    state.table[expert, c] = rank


@compiled
def _count(state: State, expert: int, c: int, rank: int, sign: int, rule: Rule, work: Floats) -> None:
    """Add (sign 1) or take away (-1) what a class sends to `rank` for an expert."""
    owner, node = c // rule.turns, rank // rule.per_node
    link = node * rule.per_node + owner % rule.per_node  # of the rank that passes rows on in this node
    place = expert * state.table.shape[1] + c
    first = 1 if sign > 0 else 0  # the count that a token's first expert here leads to, or its last leaves
    for i in range(state.begin[place], state.begin[place + 1]):
        token = state.rows[i]
        state.on_rank[token, rank] += sign
        state.on_node[token, node] += sign
        if state.on_rank[token, rank] == first and rank != owner:
            state.received[rank] += sign
        if state.on_node[token, node] == first and node != owner // rule.per_node:
            state.received_far[link] += sign
    served = state.served[expert, rank]
    state.load[rank] += work[expert, served + sign] - work[expert, served]
    state.served[expert, rank] += sign


@compiled
def _propose(state: State, p: int, i: int, q: int, j: int, rule: Rule, work: Floats, journal: Counts) -> int:
    """Make a random move of slot i of rank p, with slot j of rank q or without.

    Writes (expert, class, rank before) of each change to the journal. Returns the number of changes, or -1
    where the move is not possible.
    """
    e, f, kind = state.slots[p, i], state.slots[q, j], np.random.random()  # noqa: NPY002
    if rule.free and kind < 0.3:  # another replica serves a class
        c = np.random.randint(state.table.shape[1])  # noqa: NPY002
        if e == EMPTY or state.table[e, c] == p:
            return -1
        return _note(state, e, c, p, 0, rule, work, journal)
    if kind < 0.65:  # two experts change places
        if p == q or e == EMPTY or f == EMPTY or state.hosts[e, q] or state.hosts[f, p]:
            return -1
        state.hosts[e, q], state.hosts[f, p] = 1, 1
        state.hosts[e, p], state.hosts[f, q] = 0, 0
        state.slots[p, i], state.slots[q, j] = f, e
        noted = _move_classes(state, e, p, q, 0, rule, work, journal)
        return _move_classes(state, f, q, p, noted, rule, work, journal)
    f = np.random.randint(len(state.table))  # noqa: NPY002 - a replica of another expert instead
    if state.hosts[f, p] or (e != EMPTY and state.hosts[e].sum() < 2):
        return -1
    _put(state, p, i, f)
    noted = 0
    if e != EMPTY:
        noted = _move_classes(state, e, p, EMPTY, noted, rule, work, journal)
    return _move_classes(state, f, EMPTY, p, noted, rule, work, journal)


@compiled
def _move_classes(
    state: State,
    expert: int,
    out: int,
    into: int,
    noted: int,
    rule: Rule,
    work: Floats,
    journal: Counts,
) -> int:
    """Serve the classes of an expert that lost its replica on rank `out`, or got one on `into`, or both."""
    num_classes = state.table.shape[1]
    hosts = np.flatnonzero(state.hosts[expert])
    by_rule = np.empty((rule.turns, num_classes // rule.turns), dtype=np.int64)
    _choose_replicas(hosts, rule.nearest, rule.per_node, by_rule)
    for c in range(num_classes):
        rank = now = state.table[expert, c]
        if not rule.free:
            rank = hosts[by_rule[c % rule.turns, c // rule.turns]]
        elif now == out:
            rank = into if into != EMPTY else hosts[by_rule[c % rule.turns, c // rule.turns]]
        elif out == EMPTY and (c // rule.turns == into or np.random.randint(len(hosts)) == 0):  # noqa: NPY002
            rank = into
        if rank != now:
            noted = _note(state, expert, c, rank, noted, rule, work, journal)
    return noted


@compiled
def _note(
    state: State, expert: int, c: int, rank: int, noted: int, rule: Rule, work: Floats, journal: Counts
) -> int:
    journal[noted, 0], journal[noted, 1], journal[noted, 2] = expert, c, state.table[expert, c]
    _serve(state, expert, c, rank, rule, work)
    return noted + 1
