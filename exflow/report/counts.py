"""Messages from GPU to GPU, layer by layer: placement's count, kept apart by layer and by pair of ranks.

Owners of tokens are those that `placement/traffic/traffic.py` finds, so the sums are its totals
(`Counts.totals`).

Shapes: T tokens, L MoE layers, K = top_k, E experts, G ranks, B blocks of ranks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import owners
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]
Totals = npt.NDArray[np.int64]

_MOST_BLOCKS = 8  # columns of ribbons that an eye can follow


@dataclass(frozen=True, eq=False)
class Counts:
    """Messages between ranks under one plan and group size, and the ranks that own tokens."""

    by_layer: Totals  # [L, 2, 2] dispatch or return, inside a node or between nodes
    by_pair: Totals  # [G, G] messages from one rank to another, dispatches and returns, all layers
    load: Totals  # [L, G] (token, choice) pairs that each rank computes
    moves: Totals  # [L, B, B] tokens owned by a rank of one block before a layer, and of another after it

    @property
    def totals(self) -> dict[str, int]:
        """Sums of messages, under the names that `evaluate` gives them."""
        (dispatch_intra, dispatch_inter), (return_intra, return_inter) = self.by_layer.sum(axis=0).tolist()
        return {
            "messages": int(self.by_pair.sum()),
            "dispatch_intra": dispatch_intra,
            "dispatch_inter": dispatch_inter,
            "return_intra": return_intra,
            "return_inter": return_inter,
        }


def count(trace: RoutingTrace, plan: Plan, group_size: int) -> Counts:
    """Count the messages of each layer. Plan and group size are known to fit the trace."""
    ranks, layers, node = plan.num_ranks, plan.num_layers, plan.topology.node_of_rank
    block = blocks_of(plan.topology)
    blocks = int(block.max()) + 1
    serving = plan.serving_slot // plan.slots_per_rank  # [G, L, E] the rank that an owner's tokens go to
    owner = owners(trace, plan, group_size)  # [T, L + 1]
    crosses = ~np.eye(ranks, dtype=bool)
    between = node[:, None] != node
    by_layer = np.zeros((layers, 2, 2), dtype=np.int64)
    by_pair = np.zeros((ranks, ranks), dtype=np.int64)
    load = np.zeros((layers, ranks), dtype=np.int64)
    moves = np.zeros((layers, blocks, blocks), dtype=np.int64)
    for layer in range(layers):
        before, after = owner[:, layer], owner[:, layer + 1]
        hosts = np.sort(serving[before[:, None], layer, trace.experts[:, layer]], axis=1)  # [T, K]
        first = np.diff(hosts, axis=1, prepend=-1) != 0  # one message to each host
        token, host = np.nonzero(first)[0], hosts[first]
        sent = (_pairs(before[token], host, ranks) * crosses, _pairs(host, after[token], ranks) * crosses)
        for way, messages in enumerate(sent):
            by_layer[layer, way] = messages[~between].sum(), messages[between].sum()
            by_pair += messages
        load[layer] = np.bincount(hosts.ravel(), minlength=ranks)
        moves[layer] = _pairs(block[before], block[after], blocks)
    return Counts(by_layer, by_pair, load, moves)


def _pairs(one: IntArray, other: IntArray, size: int) -> Totals:
    """[size, size] how often each pair occurs."""
    return np.bincount(one.astype(np.int64) * size + other, minlength=size * size).reshape(size, size)


def blocks_of(topology: Topology) -> npt.NDArray[np.int64]:
    """[G] the block of each rank: at most 8 of equally many ranks of one node, or of whole nodes.

    Of two nodes with eight GPUs each: pairs of GPUs.
    """
    ranks, near = topology.num_ranks, topology.gpus_per_node
    inside = [size for size in range(1, near + 1) if near % size == 0 and ranks // size <= _MOST_BLOCKS]
    nodes_a_block = -(-topology.num_nodes // _MOST_BLOCKS)
    return np.arange(ranks) // (inside[0] if inside else nodes_a_block * near)
