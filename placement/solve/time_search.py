"""Search for the plan of least time, where every token comes home after each layer (dispatch-combine).

Layers are then independent. In each, swaps of two experts are annealed on the time that everybody waits for,
made smooth: the soft maximum over ranks (and over nodes) of the rows that they receive, and of the work of
their experts. A soft maximum is `noise * log(sum(exp(x / noise)))`. Its noise is the deviation of a drawn
batch, so an even plan is worth no more than chance leaves of it.

Shapes: T tokens, L MoE layers, K = top_k, E experts of the layer, G ranks.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import monotonic
from typing import Self

import numpy as np
import numpy.typing as npt

from exflow.placement.compiled import compiled
from exflow.placement.plan.topology import Topology
from exflow.placement.time.serving import Serving
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
Assignment = npt.NDArray[np.int64]
Tell = Callable[[str], None]
_LEVELS = 40  # temperatures, from HOT to COLD deviations of a swap's change
_HOT, _COLD = 0.5, 0.005
_TRIALS = 20  # of each expert at a temperature
_MOST_WORK = 10_000_000_000  # (token, swap) pairs looked at in all layers: about half a minute on a core
_SHORT = 0.05  # of a full round
_MOST_TOKENS = 30_000


@dataclass(frozen=True)
class Weights:
    """Microseconds of a layer for one unit of each quantity, in a batch of `tokens` tokens of all ranks.

    near, far: a row of the busiest rank or, between nodes, of the busiest node. work [E]: an expert.
    near_noise, far_noise: deviation of rows in a batch. work_noise: of a rank's work, microseconds.
    """

    tokens: int
    near: float
    far: float
    work: Floats
    near_noise: float
    far_noise: float
    work_noise: float


def weights_of(chosen: IntArray, num_experts: int, topology: Topology, serving: Serving) -> Weights:
    """The prices of a layer, from the experts [T, K] that its tokens chose."""
    machine, sizes = serving.machine.machine, serving.sizes
    ranks, nodes = topology.num_ranks, topology.num_nodes
    tokens, top_k = serving.batch * ranks, chosen.shape[1]
    share = np.bincount(chosen.ravel(), minlength=num_experts) / len(chosen)
    pair_us = 1e6 * sizes.operations / machine.flops_per_s
    weights_us = 1e6 * sizes.expert_bytes / machine.read_bytes_per_s
    touched = 1 - (1 - np.minimum(share, 1)) ** tokens
    untouched = math.sqrt(float((touched * (1 - touched)).sum()) / ranks)
    reach = _reach(top_k, ranks)
    near_link = machine.inside if ranks > nodes else machine.between
    row_us = 2e6 * sizes.row_bytes  # dispatch and combine
    return Weights(
        tokens=tokens,
        near=row_us / near_link.bytes_per_s * (1 - 1 / ranks),
        far=row_us / machine.between.bytes_per_s * (1 - 1 / nodes) / topology.gpus_per_node,
        work=weights_us * touched + pair_us * share * tokens,
        near_noise=math.sqrt(tokens * reach * (1 - reach)),
        far_noise=math.sqrt(tokens * _reach(top_k, nodes) * (1 - _reach(top_k, nodes))),
        work_noise=math.hypot(pair_us * math.sqrt(tokens * top_k / ranks), weights_us * untouched) + 1e-9,
    )


def _reach(top_k: int, parts: int) -> float:
    """Share of the tokens that choose some expert of a part, if choices were even and independent."""
    return min(max(1 - (1 - 1 / parts) ** top_k, 0.05), 0.95)


@dataclass(frozen=True, eq=False)
class Searched:
    """The assignment [L, E] that a search found, and whether Ctrl-C ended it."""

    assignment: Assignment
    interrupted: bool


def search_for_time(
    trace: RoutingTrace,
    topology: Topology,
    serving: Serving,
    starts: list[Assignment],
    *,
    seed: int = 0,
    time_limit: float = math.inf,
    tell: Tell = lambda what: None,
) -> Searched:
    """Place equally many experts on each rank, beginning with the best of `starts` [L, E] in each layer.

    A short round over all layers comes first; it tells how long the second one may be within `time_limit`
    seconds. Ctrl-C ends the search: layers that were not reached keep what they had. All layers must have the
    same number of experts. tell: is called with each layer that is done.
    """
    experts = np.asarray(trace.experts)
    if len(experts) > _MOST_TOKENS:
        experts = experts[np.linspace(0, len(experts) - 1, _MOST_TOKENS).astype(np.int64)]
    layers = [
        _Layer.of(experts[:, layer], trace.num_experts, topology, serving)
        for layer in range(trace.num_layers)
    ]
    began = monotonic()
    found = _round(layers, np.stack(starts, axis=1), topology, _SHORT, seed, tell)
    taken = monotonic() - began
    share = min(1.0, _MOST_WORK / sum(each.work_of_a_round for each in layers))
    share = min(share, (time_limit - taken) * _SHORT / max(taken, 1e-3))
    if found.interrupted or share <= _SHORT:
        return found
    return _round(layers, found.assignment[:, None], topology, share, seed + 1, tell)


def _round(
    layers: list["_Layer"], starts: Assignment, topology: Topology, share: float, seed: int, tell: Tell
) -> Searched:
    """Anneal each layer from the best of `starts` [L, S, E], with this share of the trials of a full
    round."""

    def one_layer(layer: int) -> Assignment:
        each = layers[layer]
        weights = each.weights
        return _anneal(
            each.chosen,
            starts[layer],
            topology.num_ranks,
            topology.gpus_per_node,
            (weights.near, weights.far, weights.near_noise, weights.far_noise, weights.work_noise),
            weights.tokens / len(each.chosen),
            weights.work,
            max(1, int(share * _TRIALS * len(weights.work))),
            seed * len(layers) + layer,
        )

    interrupted = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(one_layer, layer) for layer in range(len(layers))]
        try:
            for layer, run in enumerate(runs):
                wait([run])
                tell(f"layer {layer + 1} of {len(layers)}")
        except KeyboardInterrupt:
            interrupted = True
            pool.shutdown(cancel_futures=True)
    rows = [starts[layer, 0] if run.cancelled() else run.result() for layer, run in enumerate(runs)]
    return Searched(np.stack(rows), interrupted)


@dataclass(frozen=True, eq=False)
class _Layer:
    """The experts [T, K] that a layer's tokens chose, and the prices of the layer."""

    chosen: IntArray
    weights: Weights

    @classmethod
    def of(cls, chosen: IntArray, num_experts: int, topology: Topology, serving: Serving) -> Self:
        chosen = np.ascontiguousarray(chosen)
        return cls(chosen, weights_of(chosen, num_experts, topology, serving))

    @property
    def work_of_a_round(self) -> float:
        """(token, swap) pairs looked at: a swap looks at the tokens of two experts."""
        return _LEVELS * _TRIALS * 2 * self.chosen.size


@compiled
def _anneal(
    chosen: IntArray,  # [T, K]
    starts: Assignment,  # [S, E]
    ranks: int,
    per_node: int,
    prices: tuple[float, float, float, float, float],
    scale: float,  # from tokens of the trace to those of a batch
    work: Floats,  # [E]
    trials: int,  # swaps at each temperature
    seed: int,
) -> Assignment:
    """The best assignment [E] that annealed swaps find from the best of `starts`."""
    np.random.seed(seed)  # noqa: NPY002 - numba's generator
    rows, begin = _rows_by_expert(chosen, len(work))
    best_cost = np.inf
    best: Assignment = starts[0].copy()
    for start in starts:
        state = _state(chosen, start, ranks, per_node, work)
        cost = _cost(state[2], state[3], state[4], prices, scale)
        if cost < best_cost:
            best_cost, best = cost, start.copy()
    assignment = best.copy()
    on_rank, on_node, received, received_by_node, load = _state(chosen, assignment, ranks, per_node, work)
    deviation = 0.0
    change = np.zeros(4, dtype=np.int64)
    cost = best_cost
    for level in range(_LEVELS + 1):  # the first is to learn how much swaps change
        temperature = deviation * _HOT * (_COLD / _HOT) ** ((level - 1) / (_LEVELS - 1))
        for _ in range(trials):
            e, f = np.random.randint(len(work)), np.random.randint(len(work))  # noqa: NPY002
            p, q = assignment[e], assignment[f]
            if p == q:
                continue
            _swap_change(chosen, rows, begin, on_rank, on_node, e, f, p, q, per_node, change)
            more = work[f] - work[e]
            _apply(received, received_by_node, load, change, more, p, q, per_node, 1)
            new = _cost(received, received_by_node, load, prices, scale)
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
def _state(
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
def _cost(
    received: IntArray,
    received_by_node: IntArray,
    load: Floats,
    prices: tuple[float, float, float, float, float],
    scale: float,
) -> float:
    """Microseconds of a layer, with soft maxima in place of maxima."""
    near, far, near_noise, far_noise, work_noise = prices
    exchange = near * _soft_maximum(received, scale, near_noise)
    if len(received_by_node) > 1 and len(received_by_node) < len(received):
        crossing = far * _soft_maximum(received_by_node, scale, far_noise)
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
