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

from exflow.placement.plan.topology import Topology
from exflow.placement.solve.time_swaps import LEVELS, Assignment, Floats, IntArray, anneal
from exflow.placement.time.serving import Serving
from exflow.profiling.trace import RoutingTrace

Tell = Callable[[str], None]
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
        return anneal(
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
        return LEVELS * _TRIALS * 2 * self.chosen.size
