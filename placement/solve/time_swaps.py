"""Annealed swaps of two experts of one layer, judged by the time that everybody waits for (see time_search).

A swap changes what two ranks receive, and the work of their experts. What they receive is counted token by
token: only the tokens of the two experts are looked at.

Shapes: T tokens, K = top_k, E experts, G ranks, S starts.
"""

import math

import numpy as np
import numpy.typing as npt

from exflow.placement.compiled import compiled

IntArray = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
Assignment = npt.NDArray[np.int64]
LEVELS = 40  # temperatures, from HOT to COLD times the largest change of a swap
HOT, COLD = 0.5, 0.005


@compiled
def anneal(
    chosen: IntArray,  # [T, K]
    starts: Assignment,  # [S, E]
    ranks: int,
    per_node: int,
    prices: tuple[float, float, float, float, float],
    scale: float,  # from tokens of the trace to those of a batch
    work: Floats,  # [E]
    group: int,  # experts that may change places: 0 .. group - 1, and so on
    trials: int,  # swaps at each temperature
    seed: int,
) -> Assignment:
    """The best assignment [E] that annealed swaps find from the best of `starts`."""
    np.random.seed(seed)  # noqa: NPY002 - numba's generator
    rows, begin = _rows_by_expert(chosen, len(work))
    best_cost = np.inf
    best: Assignment = starts[0].copy()
    for start in starts:
        state = counts_of(chosen, start, ranks, per_node, work)
        cost = cost_us(state[2], state[3], state[4], prices, scale)
        if cost < best_cost:
            best_cost, best = cost, start.copy()
    assignment = best.copy()
    on_rank, on_node, received, received_by_node, load = counts_of(chosen, assignment, ranks, per_node, work)
    deviation = 0.0
    change = np.zeros(4, dtype=np.int64)
    cost = best_cost
    for level in range(LEVELS + 1):  # the first is to learn how much swaps change
        temperature = deviation * HOT * (COLD / HOT) ** ((level - 1) / (LEVELS - 1))
        for _ in range(trials):
            e = np.random.randint(len(work))  # noqa: NPY002
            f = e // group * group + np.random.randint(group)  # noqa: NPY002
            p, q = assignment[e], assignment[f]
            if p == q:
                continue
            _swap_change(chosen, rows, begin, on_rank, on_node, e, f, p, q, per_node, change)
            more = work[f] - work[e]
            _apply(received, received_by_node, load, change, more, p, q, per_node, 1)
            new = cost_us(received, received_by_node, load, prices, scale)
            if level == 0:
                deviation = max(deviation, abs(new - cost))
                accepted = False
            else:
                accepted = new <= cost or np.random.random() < math.exp((cost - new) / temperature)  # noqa: NPY002
            if not accepted:
                _apply(received, received_by_node, load, change, more, p, q, per_node, -1)
                continue
            cost = new
            assignment[e], assignment[f] = q, p
            _move(rows, begin, on_rank, on_node, e, p, q, per_node)
            _move(rows, begin, on_rank, on_node, f, q, p, per_node)
            if cost < best_cost - 1e-9:
                best_cost, best = cost, assignment.copy()
        if level == 0 and deviation == 0.0:
            break
    return best


@compiled
def _rows_by_expert(chosen: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """The tokens that choose expert 0, then expert 1, ...; and the place where each expert's tokens begin [E
    + 1]."""
    begin = np.zeros(num_experts + 1, dtype=np.int64)
    for token in range(len(chosen)):
        for expert in chosen[token]:
            begin[expert + 1] += 1
    for expert in range(num_experts):
        begin[expert + 1] += begin[expert]
    rows, at = np.empty(chosen.size, dtype=np.int32), begin[:-1].copy()
    for token in range(len(chosen)):
        for expert in chosen[token]:
            rows[at[expert]] = token
            at[expert] += 1
    return rows, begin


@compiled
def counts_of(
    chosen: IntArray, assignment: Assignment, ranks: int, per_node: int, work: Floats
) -> tuple[IntArray, IntArray, IntArray, IntArray, Floats]:
    """Counts of an assignment: each token's experts by rank and node, the tokens that each rank and node
    receives, and each rank's work."""
    on_rank = np.zeros((len(chosen), ranks), dtype=np.uint8)
    on_node = np.zeros((len(chosen), ranks // per_node), dtype=np.uint8)
    received = np.zeros(ranks, dtype=np.int64)
    received_by_node = np.zeros(ranks // per_node, dtype=np.int64)
    load = np.zeros(ranks)
    for token in range(len(chosen)):
        for expert in chosen[token]:
            rank = assignment[expert]
            node = rank // per_node
            if on_rank[token, rank] == 0:
                received[rank] += 1
            if on_node[token, node] == 0:
                received_by_node[node] += 1
            on_rank[token, rank] += 1
            on_node[token, node] += 1
    for expert in range(len(assignment)):
        load[assignment[expert]] += work[expert]
    return on_rank, on_node, received, received_by_node, load


@compiled
def _soft_maximum(counts: IntArray, scale: float, noise: float) -> float:
    """Soft maximum of the counts and as many copies of their mean: sent rows are even, received rows need not
    be."""
    top, mean = counts.max() * scale, counts.mean() * scale
    total = len(counts) * math.exp((mean - top) / noise)
    for count in counts:
        total += math.exp((count * scale - top) / noise)
    return float(top + noise * math.log(total / (2 * len(counts))))


@compiled
def cost_us(
    received: IntArray,
    received_far: IntArray,
    load: Floats,
    prices: tuple[float, float, float, float, float],
    scale: float,
) -> float:
    """Microseconds of a layer, with soft maxima in place of maxima.

    received_far: rows between nodes, by node or by link; not looked at where `far` among the prices is 0.
    """
    near, far, near_noise, far_noise, work_noise = prices
    exchange = near * _soft_maximum(received, scale, near_noise)
    if far > 0:
        crossing = far * _soft_maximum(received_far, scale, far_noise)
        exchange = max(exchange, crossing) + 0.1 * min(exchange, crossing)
    top, total = load.max(), 0.0
    for each in load:
        total += math.exp((each - top) / work_noise)
    return float(exchange + top + work_noise * math.log(total / len(load)))


@compiled
def _swap_change(
    chosen: IntArray,
    rows: IntArray,
    begin: IntArray,
    on_rank: IntArray,
    on_node: IntArray,
    e: int,
    f: int,
    p: int,
    q: int,
    per_node: int,
    change: IntArray,
) -> None:
    """Write to `change` how exchanging e (on p) and f (on q) changes the tokens that p, q and their nodes
    receive."""
    change[:] = 0
    _leave(chosen, rows, begin, on_rank, e, f, p, q, change[:2])
    _leave(chosen, rows, begin, on_rank, f, e, q, p, change[:2][::-1])
    a, b = p // per_node, q // per_node
    if a != b and per_node > 1:
        _leave(chosen, rows, begin, on_node, e, f, a, b, change[2:])
        _leave(chosen, rows, begin, on_node, f, e, b, a, change[2:][::-1])


@compiled
def _leave(
    chosen: IntArray,
    rows: IntArray,
    begin: IntArray,
    on_part: IntArray,
    leaver: int,
    comer: int,
    here: int,
    there: int,
    change: IntArray,
) -> None:
    """Count the tokens that choose `leaver`, and not `comer`, and are lost here or won there."""
    for i in range(begin[leaver], begin[leaver + 1]):
        token = rows[i]
        lost, won = on_part[token, here] == 1, on_part[token, there] == 0
        if not (lost or won):
            continue
        both = False
        for expert in chosen[token]:
            both |= expert == comer
        if both:
            continue
        change[0] -= int(lost)
        change[1] += int(won)


@compiled
def _apply(
    received: IntArray,
    received_by_node: IntArray,
    load: Floats,
    change: IntArray,
    more: float,
    p: int,
    q: int,
    per_node: int,
    sign: int,
) -> None:
    received[p] += sign * change[0]
    received[q] += sign * change[1]
    received_by_node[p // per_node] += sign * change[2]
    received_by_node[q // per_node] += sign * change[3]
    load[p] += sign * more
    load[q] -= sign * more


@compiled
def _move(
    rows: IntArray,
    begin: IntArray,
    on_rank: IntArray,
    on_node: IntArray,
    expert: int,
    p: int,
    q: int,
    per_node: int,
) -> None:
    for i in range(begin[expert], begin[expert + 1]):
        token = rows[i]
        on_rank[token, p] -= 1
        on_rank[token, q] += 1
        on_node[token, p // per_node] -= 1
        on_node[token, q // per_node] += 1
