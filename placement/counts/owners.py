"""Counts the table by which the runtime chooses a token's next owner: the rank it will want in the next
layer.

Shapes: T tokens, L MoE layers, K = top_k, E experts, G ranks.
"""

import numpy as np
import numpy.typing as npt

from exflow.placement.compiled import compiled
from exflow.profiling.sequences import consecutive_rows
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]
Counts = npt.NDArray[np.int64]


def next_owner_table(trace: RoutingTrace, hosts: npt.NDArray[np.bool_]) -> npt.NDArray[np.int16]:
    """[L, E, G] int16, per mille: how often rank g hosts some expert of a token's next layer, given expert e.

    Entry (l, e, g) is the share of the tokens that select e in layer l for which rank g hosts at least one
    of the experts they select in layer l + 1, rounded half up. After the last layer comes the first layer of
    the sequence's next row; tokens without one do not count there. Experts never seen have zeros.
    `hosts` is [L, E, G]: whether rank g has a replica of the expert. Where several ranks are equally cheap
    owners of a token now, this tells them apart by what comes next.
    """
    experts = np.asarray(trace.experts)
    num_layers, num_experts, num_ranks = hosts.shape
    ranks_of = [_lists(layer) for layer in hosts]
    selected = np.zeros((num_layers, num_experts, 1), dtype=np.int64)
    hosted = np.zeros((num_layers, num_experts, num_ranks), dtype=np.int64)
    every_row = np.arange(trace.num_tokens)
    for layer in range(num_layers - 1):
        _count_next_hosts(experts, layer, every_row, every_row, *ranks_of[layer + 1], selected, hosted)
    rows = consecutive_rows(trace.sequence)
    _count_next_hosts(experts, num_layers - 1, *rows, *ranks_of[0], selected, hosted)
    selected = np.maximum(selected, 1)
    return ((2000 * hosted + selected) // (2 * selected)).astype(np.int16)


def _lists(hosts: npt.NDArray[np.bool_]) -> tuple[Counts, Counts]:
    """The ranks of every expert, one expert after the other, and where each expert's begin: [N], [E + 1]."""
    expert, rank = np.nonzero(hosts)
    return rank, np.searchsorted(expert, np.arange(len(hosts) + 1))


@compiled
def _count_next_hosts(
    experts: IntArray,  # [T, L, K]
    layer: int,
    row: Counts,  # [N] the tokens that count ...
    next_row: Counts,  # [N] ... and where to find what they select next
    ranks: Counts,  # the ranks that host expert e of the next layer ...
    begin: Counts,  # ... are ranks[begin[e] : begin[e + 1]]
    selected: Counts,  # [L, E, 1] tokens that select e, counted into
    hosted: Counts,  # [L, E, G] those of them whose next experts are on g at least once, counted into
) -> None:
    next_layer = (layer + 1) % experts.shape[1]
    seen = np.full(hosted.shape[2], -1, dtype=np.int64)  # the last n that rank g was counted for
    found = np.empty(hosted.shape[2], dtype=np.int64)
    for n in range(len(row)):
        here, there = experts[row[n], layer], experts[next_row[n], next_layer]
        count = 0
        for expert in there:
            for i in range(begin[expert], begin[expert + 1]):
                if seen[ranks[i]] != n:
                    seen[ranks[i]] = n
                    found[count] = ranks[i]
                    count += 1
        for i in range(len(here)):
            if here[i] not in here[:i]:
                selected[layer, here[i], 0] += 1
                for host in found[:count]:
                    hosted[layer, here[i], host] += 1
