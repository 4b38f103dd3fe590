"""Counts a routing trace: how often experts follow one another, are selected together, and are selected.

Shapes: T tokens, L MoE layers, K = top_k, E experts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exflow.placement.compiled import compiled
from exflow.profiling.sequences import consecutive_rows
from exflow.profiling.trace import RoutingTrace

_CHUNK = 4096  # tokens at a time: a chunk of the trace stays in the cache while every layer reads its column

IntArray = npt.NDArray[np.integer]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AffinityCounts:
    """Everything a solver needs to know of a trace (the paper's inter-layer affinity, and what top-k adds).

    All arrays are int64. Divided by `load`, a row of `inter` is P(expert f in layer l + 1 | expert e in
    layer l), times top_k.
    """

    inter: Counts  # [L-1, E, E] (token, choice, choice) triples with e in layer l and f in layer l + 1
    wrap: Counts  # [E, E] the same from a token's last layer to the first layer of its sequence's next row
    intra: Counts  # [L, E, E] tokens that select both e and f in layer l; symmetric, zero diagonal
    load: Counts  # [L, E] (token, choice) pairs
    num_tokens: int
    top_k: int


def count_affinity(trace: RoutingTrace) -> AffinityCounts:
    """Count the trace in one pass. Expert ids are read where they lie, memory-mapped or not."""
    experts = np.asarray(trace.experts)  # a plain view: numba reads a memory map without copying it
    num_layers, num_experts = trace.num_layers, trace.num_experts
    inter = np.zeros((num_layers - 1, num_experts, num_experts), dtype=np.int64)
    wrap = np.zeros((num_experts, num_experts), dtype=np.int64)
    intra = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
    load = np.zeros((num_layers, num_experts), dtype=np.int64)
    _count_layers(experts, inter, intra, load)
    _count_wrap(experts, *consecutive_rows(trace.sequence), wrap)
    intra += intra.transpose(0, 2, 1)  # counted once, with e before f in the token's choices
    return AffinityCounts(inter, wrap, intra, load, trace.num_tokens, trace.top_k)


@compiled
def _count_layers(experts: IntArray, inter: Counts, intra: Counts, load: Counts) -> None:
    num_tokens, num_layers, top_k = experts.shape
    distinct = np.empty(top_k, dtype=np.int64)
    for start in range(0, num_tokens, _CHUNK):
        tokens = range(start, min(start + _CHUNK, num_tokens))
        for layer in range(num_layers):
            for token in tokens:
                for i in range(top_k):
                    load[layer, experts[token, layer, i]] += 1
            if top_k > 1:
                for token in tokens:
                    _count_together(experts, token, layer, distinct, intra[layer])
            if layer + 1 < num_layers:
                for token in tokens:
                    _count_pairs(experts, token, layer, token, layer + 1, inter[layer])


@compiled
def _count_wrap(experts: IntArray, row: Counts, next_row: Counts, wrap: Counts) -> None:
    for i in range(len(row)):
        _count_pairs(experts, row[i], experts.shape[1] - 1, next_row[i], 0, wrap)


@compiled
def _count_pairs(
    experts: IntArray, token: int, layer: int, next_token: int, next_layer: int, pairs: Counts
) -> None:
    for i in range(experts.shape[2]):
        for j in range(experts.shape[2]):
            pairs[experts[token, layer, i], experts[next_token, next_layer, j]] += 1


@compiled
def _count_together(experts: IntArray, token: int, layer: int, distinct: Counts, pairs: Counts) -> None:
    """Add each pair of distinct experts once, even if a token names one twice; `distinct` [K] is scratch."""
    count = 0
    for i in range(experts.shape[2]):
        expert = experts[token, layer, i]
        if expert not in distinct[:count]:
            for j in range(count):
                pairs[distinct[j], expert] += 1
            distinct[count] = expert
            count += 1
