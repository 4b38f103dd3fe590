"""Experts with several replicas: which ranks host them, and which replica serves an owner's tokens.

Shapes: L MoE layers, E experts, P slots a layer, G ranks, S = P / G slots a rank.
"""

import numpy as np
import numpy.typing as npt

from exflow.placement.plan.topology import Topology

IntArray = npt.NDArray[np.integer]


def equal_slots(num_experts: int, num_ranks: int) -> int:
    """The least number of slots of a layer that holds so many experts and that the ranks share equally."""
    return -(-num_experts // num_ranks) * num_ranks


def hosting(physical_to_logical: IntArray, num_experts: int, num_ranks: int) -> npt.NDArray[np.bool_]:
    """[L, E, G]: whether rank g has a replica of expert e, from the map [L, P]."""
    num_layers, num_slots = physical_to_logical.shape
    hosts = np.zeros((num_layers, num_experts, num_ranks), dtype=np.bool_)
    rank = np.arange(num_slots) // (num_slots // num_ranks)
    hosts[np.arange(num_layers)[:, None], physical_to_logical, rank] = True
    return hosts


def serving_slots(
    physical_to_logical: IntArray, num_experts: int, topology: Topology
) -> npt.NDArray[np.int64]:
    """[G, L, E] int64: the slot that a token owned by rank g is sent to for expert e.

    A replica on the owner's rank serves, else one on its node, else any. Where several are equally near, the
    ranks that have none take turns: the i-th of them is served by replica i modulo their number. It is the
    rule of SGLang's static dispatch, with turns in the place of its draws. An expert that a layer does not
    have is -1.

    Example. Four ranks on one node, expert 0 in the slots of ranks 1 and 2: they serve themselves, rank 0
    goes to rank 1 and rank 3 to rank 2.
    """
    num_layers, num_slots = physical_to_logical.shape
    per_rank = num_slots // topology.num_ranks
    serving = np.full((topology.num_ranks, num_layers, num_experts), -1, dtype=np.int64)
    for layer, row in enumerate(physical_to_logical):
        order = np.argsort(row, kind="stable")
        experts, first, count = np.unique(row[order], return_index=True, return_counts=True)
        serving[:, layer, experts[count == 1]] = order[first[count == 1]]
        for expert, begin, replicas in zip(experts, first, count, strict=True):
            if replicas > 1:
                slots = order[begin : begin + replicas]
                serving[:, layer, expert] = _serve(slots, slots // per_rank, topology.node_of_rank)
    return serving


def _serve(slots: IntArray, rank: IntArray, node: IntArray) -> IntArray:
    """[G]: for every rank one of `slots`, which lie on the ranks `rank`."""
    serving = np.full(len(node), -1)
    serving[rank[::-1]] = slots[::-1]  # of two on one rank, the first
    for place in np.unique(node):
        near = slots[node[rank] == place]
        waiting = np.flatnonzero((node == place) & (serving < 0))
        if len(near):
            serving[waiting] = near[np.arange(len(waiting)) % len(near)]
    waiting = np.flatnonzero(serving < 0)
    serving[waiting] = slots[np.arange(len(waiting)) % len(slots)]
    return serving
