"""Which GPU sends to which, layer by layer: placement's count, kept apart by layer and by pair of ranks.

The rules are those of `placement/traffic/traffic.py`, whose functions choose hosts and owners here too; the
sums are its totals (`Counts.totals`).

Shapes: T tokens, L MoE layers, K = top_k, E experts, G ranks, B blocks of ranks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import choose_owner, distinct_hosts
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]
Totals = npt.NDArray[np.int64]

_MOST_BLOCKS = 8  # columns of ribbons that an eye can follow


@dataclass(frozen=True, eq=False)
class Counts:
    """What crosses under one plan and group size, in messages, and where tokens are meanwhile."""

    by_layer: Totals  # [L, 2, 2] dispatch or return, inside a node or between nodes
    by_pair: Totals  # [G, G] messages from one rank to another, dispatches and returns, all layers
    load: Totals  # [L, G] (token, choice) pairs that each rank computes
    moves: Totals  # [L, B, B] tokens owned by a rank of one block before a layer, and of another after it

    @property
    def totals(self) -> dict[str, int]:
        """Under the names of `evaluate`."""
        (dispatch_intra, dispatch_inter), (return_intra, return_inter) = self.by_layer.sum(axis=0).tolist()
        return {
            "messages": int(self.by_pair.sum()),
            "dispatch_intra": dispatch_intra,
            "dispatch_inter": dispatch_inter,
            "return_intra": return_intra,
            "return_inter": return_inter,
        }


def count(trace: RoutingTrace, plan: Plan, group_size: int) -> Counts:
    """Follow the trace as `placement.traffic.follow` does; plan and group size are known to fit."""
    ids, sequence = np.unique(trace.sequence, return_inverse=True)
    ranks, layers = plan.num_ranks, plan.num_layers
    block = blocks_of(plan.topology)
    by_layer = np.zeros((layers, 2, 2), dtype=np.int64)
    by_pair = np.zeros((ranks, ranks), dtype=np.int64)
    load = np.zeros((layers, ranks), dtype=np.int64)
    moves = np.zeros((layers, block.max() + 1, block.max() + 1), dtype=np.int64)
    next_owner = plan.next_owner
    if next_owner is None:
        next_owner = np.zeros((layers, plan.num_experts, ranks), dtype=np.int16)
    _count(
        np.asarray(trace.experts),  # a plain view: numba reads a memory map without copying it
        sequence,
        ids.astype(np.int64) % ranks,
        (plan.serving_slot // plan.slots_per_rank).astype(np.int16),
        next_owner.astype(np.int16),
        group_size,
        plan.topology.node_of_rank,
        block,
        by_layer,
        by_pair,
        load,
        moves,
    )
    return Counts(by_layer, by_pair, load, moves)


def blocks_of(topology: Topology) -> npt.NDArray[np.int64]:
    """[G] the block of each rank: at most 8 of equally many ranks of one node, or of whole nodes.

    Of two nodes with eight GPUs each: pairs of GPUs.
    """
    ranks, near = topology.num_ranks, topology.gpus_per_node
    inside = [size for size in range(1, near + 1) if near % size == 0 and ranks // size <= _MOST_BLOCKS]
    nodes_a_block = -(-topology.num_nodes // _MOST_BLOCKS)
    return np.arange(ranks) // (inside[0] if inside else nodes_a_block * near)


@njit(nogil=True)  # not cached: a cache would not see that a function of traffic.py changed
def _count(
    experts: IntArray,  # [T, L, K]
    sequence: IntArray,  # [T] 0, 1, ... without gaps
    home: IntArray,  # [sequences] rank
    serving: IntArray,  # [G, L, E] the rank that an owner's tokens go to
    next_owner: IntArray,  # [L, E, G]
    group_size: int,
    node: IntArray,  # [G]
    block: IntArray,  # [G]
    by_layer: Totals,  # the fields of Counts, counted into
    by_pair: Totals,
    load: Totals,
    moves: Totals,
) -> None:
    num_tokens, num_layers, top_k = experts.shape
    hosts = np.empty(top_k, dtype=np.int64)
    owner_of = home.copy()
    for token in range(num_tokens):
        owner = owner_of[sequence[token]]
        for layer in range(num_layers):
            chosen = experts[token, layer]
            present = hosts[: distinct_hosts(chosen, serving[owner, layer], load[layer], hosts)]
            for host in present:
                if host != owner:
                    by_layer[layer, 0, int(node[host] != node[owner])] += 1
                    by_pair[owner, host] += 1
            before = owner
            owner = choose_owner(owner, present, chosen, next_owner[layer], group_size)
            for host in present:
                if host != owner:
                    by_layer[layer, 1, int(node[host] != node[owner])] += 1
                    by_pair[host, owner] += 1
            moves[layer, block[before], block[owner]] += 1
        owner_of[sequence[token]] = owner
