"""Experts with several replicas: which ranks host them, and which replica serves an owner's tokens.

Shapes: L MoE layers, E experts, P slots a layer, G ranks, S = P / G slots a rank, W turns.
"""

import math
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from exflow.placement.plan.topology import Topology

IntArray = npt.NDArray[np.integer]
TURNS = 12  # turns of up to 4 replicas are exact, those of more nearly even


class ReplicaRule(StrEnum):
    """Ways to choose the replica that serves a token.

    TABLE     the plan's table of ranks; NEAREST for a plan that has none
    NEAREST   the owner's rank, else one on its node, else any; those equally near take turns by owner. It is
              the rule of SGLang's static dispatch, with turns in the place of its draws
    BY_RANK   replica "owner's rank modulo number of replicas" (vllm-ascend, `generate_log2phy_map`)
    IN_TURN   replica "place among the choices of a rank's batch modulo number of replicas" (vLLM,
              `eplb_map_to_physical`; TensorRT-LLM counts the choices of each expert)
    """

    TABLE = "table"
    NEAREST = "nearest"
    BY_RANK = "by rank"
    IN_TURN = "in turn"


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


def with_spare(rank_of_expert: IntArray, preferred: IntArray, per_rank: int) -> npt.NDArray[np.int64]:
    """[G, S]: the experts in S = `per_rank` slots of each rank: its own, then others by preference.

    rank_of_expert [E]; preferred [G, E]: the experts, those that a rank would have most of all first.
    """
    slots = []
    for rank, order in enumerate(preferred):
        own, others = np.flatnonzero(rank_of_expert == rank), order[rank_of_expert[order] != rank]
        slots.append(np.resize(np.concatenate([own, others]), per_rank))
    return np.stack(slots)


def serving_slots(
    physical_to_logical: IntArray,
    num_experts: int,
    topology: Topology,
    rule: ReplicaRule = ReplicaRule.NEAREST,
) -> npt.NDArray[np.int64]:
    """[W, G, L, E] int64: the slot that a token owned by rank g is sent to for expert e in turn w.

    W is 1 unless the rule is IN_TURN and some expert has replicas. An expert that a layer does not have is
    -1.

    Example. Four ranks on one node, expert 0 in the slots of ranks 1 and 2: by NEAREST they serve themselves,
    rank 0 goes to rank 1 and rank 3 to rank 2.
    """
    num_layers, num_slots = physical_to_logical.shape
    per_rank, nearest = num_slots // topology.num_ranks, rule in (ReplicaRule.TABLE, ReplicaRule.NEAREST)
    turns = TURNS if rule == ReplicaRule.IN_TURN and num_slots > num_experts else 1
    serving = np.full((turns, topology.num_ranks, num_layers, num_experts), -1, dtype=np.int64)
    chosen = np.empty((turns, topology.num_ranks), dtype=np.int64)
    for layer, row in enumerate(physical_to_logical):
        order = np.argsort(row, kind="stable")
        experts, first, count = np.unique(row[order], return_index=True, return_counts=True)
        serving[:, :, layer, experts[count == 1]] = order[first[count == 1]]
        for expert, begin, replicas in zip(experts, first, count, strict=True):
            if replicas > 1:
                slots = order[begin : begin + replicas]
                choose_replicas(slots // per_rank, nearest, topology.gpus_per_node, chosen)
                serving[:, :, layer, expert] = slots[chosen]
    return serving


def choose_replicas(rank: IntArray, nearest: bool, per_node: int, chosen: IntArray) -> None:
    """Write to `chosen` [W, G] which of the replicas on the ranks `rank`, in ascending order, serves.

    The search compiles it; so it keeps to loops and numbers.
    """
    turns, num_ranks = chosen.shape
    replicas = len(rank)
    if not nearest:
        for owner in range(num_ranks):
            for turn in range(turns):
                chosen[turn, owner] = (turn if turns > 1 else owner) % replicas
        return
    first = strangers = 0  # strangers: ranks so far on nodes without a replica
    # after so many strangers turns shift by one: else ranks with one place in their nodes would choose alike,
    # and all their rows would come over one link
    shift = per_node * replicas // math.gcd(per_node, replicas)
    for begin in range(0, num_ranks, per_node):
        last = first  # the replicas first .. last - 1 are on this node
        while last < replicas and rank[last] < begin + per_node:
            last += 1
        own, guests = first, 0  # guests: ranks so far of this node without a replica
        for owner in range(begin, begin + per_node):
            while own < last and rank[own] < owner:
                own += 1
            if own < last and rank[own] == owner:
                chosen[:, owner] = own
            elif first < last:
                chosen[:, owner] = first + guests % (last - first)
                guests += 1
            else:
                chosen[:, owner] = (strangers + strangers // shift) % replicas
                strangers += 1
        first = last
