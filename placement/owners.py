"""Which rank will a token want next?  The table by which the runtime chooses a token's owner.

Shapes: T tokens, L MoE layers, K = top_k, E experts, G ranks.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from exflow.placement.affinity import consecutive_rows
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]
Counts = npt.NDArray[np.int64]


def next_owner_table(trace: RoutingTrace, rank_of_expert: IntArray, num_ranks: int) -> npt.NDArray[np.int16]:
    """[L, E, G] int16, per mille: how often rank g hosts some expert of a token's next layer, given expert e.

    Entry (l, e, g) is the share of the tokens that select e in layer l for which rank g hosts at least one
    of the experts they select in layer l + 1, rounded half up. After the last layer comes the first layer of
    the sequence's next row; tokens without one do not count there. Experts never seen have zeros.
    `rank_of_expert` is [L, E]. Where several ranks are equally cheap owners of a token now, this tells them
    apart by what comes next.
    """
    experts, ranks = np.asarray(trace.experts), rank_of_expert.astype(np.int64)
    num_layers, num_experts = ranks.shape
    selected = np.zeros((num_layers, num_experts, 1), dtype=np.int64)
    hosted = np.zeros((num_layers, num_experts, num_ranks), dtype=np.int64)
    every_row = np.arange(trace.num_tokens)
    for layer in range(num_layers - 1):
        _count_next_hosts(experts, layer, every_row, every_row, ranks, selected, hosted)
    _count_next_hosts(experts, num_layers - 1, *consecutive_rows(trace.sequence), ranks, selected, hosted)
    selected = np.maximum(selected, 1)
    return ((2000 * hosted + selected) // (2 * selected)).astype(np.int16)


@njit(cache=True, nogil=True)
def distinct_hosts(chosen: IntArray, rank_of_expert: IntArray, hosts: IntArray) -> int:
    """Write the ranks of the `chosen` experts [K], each once, to the front of `hosts` [K]; count them."""
    count = 0
    for expert in chosen:
        rank = rank_of_expert[expert]
        if rank not in hosts[:count]:
            hosts[count] = rank
            count += 1
    return count


@njit(cache=True, nogil=True)
def _count_next_hosts(
    experts: IntArray,  # [T, L, K]
    layer: int,
    row: Counts,  # [N] the tokens that count ...
    next_row: Counts,  # [N] ... and where to find what they select next
    rank_of_expert: Counts,  # [L, E]
    selected: Counts,  # [L, E, 1] tokens that select e, counted into
    hosted: Counts,  # [L, E, G] those of them whose next experts are on g at least once, counted into
) -> None:
    next_layer = (layer + 1) % experts.shape[1]
    hosts = np.empty(experts.shape[2], dtype=np.int64)
    for n in range(len(row)):
        here, there = experts[row[n], layer], experts[next_row[n], next_layer]
        count = distinct_hosts(there, rank_of_expert[next_layer], hosts)
        for i in range(len(here)):
            if here[i] not in here[:i]:
                selected[layer, here[i], 0] += 1
                for host in hosts[:count]:
                    hosted[layer, here[i], host] += 1
