"""Load balancing alone, as engines do it today: the published idea of DeepSeek's EPLB.

The hottest experts get replicas until all slots are taken; then the replicas are packed, the heaviest first,
each onto the lightest rank that has a free slot: onto nodes first, then onto the GPUs inside each. Affinity
plays no part: that is what the other methods are measured against. An expert's replicas are spread over the
ranks, as not every engine takes two on one; `levelling` lets them share a GPU where that is more level.

Shapes: L MoE layers, E experts, P slots.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.plan.replicas import equal_slots
from exflow.placement.plan.topology import Topology

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.integer] | npt.NDArray[np.floating]


def load_only(load: Numbers, num_ranks: int, num_nodes: int = 1, num_slots: int | None = None) -> IntArray:
    """physical_to_logical_map [L, P] for loads [L, E]; a rank's experts in ascending order.

    P is `num_slots`, a multiple of the ranks and E at least; by default the least such. Two replicas of one
    expert share a rank only if there are more of them than ranks. Raises InputError where the numbers
    contradict each other.
    """
    _check_load(load)
    if num_ranks < 1 or num_nodes < 1 or num_ranks % num_nodes:
        raise InputError(
            f"{num_ranks} ranks cannot be shared equally by {num_nodes} nodes; give a multiple, 1 at least"
        )
    if num_slots is None:
        num_slots = equal_slots(load.shape[1], num_ranks)
    if num_slots % num_ranks:
        raise InputError(f"{num_slots} slots cannot be shared equally by {num_ranks} ranks; give a multiple")
    counts = replica_counts(load, num_slots, num_ranks)
    layers = zip(load.astype(np.float64), counts, strict=True)
    return np.stack([_pack_layer(row, count, num_ranks, num_nodes) for row, count in layers])


def load_only_layers(
    load: Numbers, experts_per_layer: Sequence[int], topology: Topology, num_slots: int
) -> IntArray:
    """`load_only` [L, P] for layers with different numbers of experts; layer l has the first of load [L,
    E]."""
    layers = [
        load_only(row[None, :num_experts], topology.num_ranks, topology.num_nodes, num_slots)
        for row, num_experts in zip(load, experts_per_layer, strict=True)
    ]
    return np.concatenate(layers)


def replica_counts(load: Numbers, num_slots: int, num_ranks: int) -> IntArray:
    """[L, E] replicas of each expert, one at least, `num_slots` in each layer, for loads [L, E].

    Slot by slot the expert with the most load per replica gets another (of equals the first): that makes the
    largest load per replica as small as it can be, up to one a rank: an expert gets more replicas only when
    every other has as many. Raises InputError if there are fewer slots than experts.
    """
    _check_load(load)
    if num_ranks < 1:
        raise InputError(f"num_ranks is {num_ranks}; give 1 or more")
    if num_slots < load.shape[1]:
        raise InputError(f"{num_slots} slots do not hold {load.shape[1]} experts; give as many at least")
    counts = np.ones(load.shape, dtype=np.int64)
    for row, count in zip(load, counts, strict=True):
        # The least first: -load per replica (below 0 or 0), then, where each rank has one, their number.
        heap = [(-float(each) if num_ranks > 1 else 1.0, expert) for expert, each in enumerate(row)]
        heapq.heapify(heap)
        for _ in range(num_slots - len(row)):
            expert = heap[0][1]
            count[expert] += 1
            more_is_of_use = count[expert] < num_ranks
            key = -float(row[expert]) / count[expert] if more_is_of_use else float(count[expert])
            heapq.heapreplace(heap, (key, expert))
    return counts


def _pack_layer(load: FloatArray, count: IntArray, num_ranks: int, num_nodes: int) -> IntArray:
    """[P]: the experts of one layer, rank after rank."""
    weight, experts = load / count, np.arange(len(load))
    nodes = _pack(weight, count, num_nodes)
    ranks = np.concatenate([_pack(weight, node, num_ranks // num_nodes) for node in nodes])
    return np.concatenate([np.repeat(experts, replicas) for replicas in ranks])


def _pack(weight: FloatArray, count: IntArray, num_packs: int) -> IntArray:
    """[packs, E]: how many replicas of each expert every pack gets, of `count` [E] of `weight` [E] each.

    All packs get equally many replicas, and of one expert all get the same number or one more. The heaviest
    come first, onto the lightest packs with room. Where that would leave the others no way to be shared out
    so, they go onto the emptiest packs, which always does.
    """
    packs = np.tile(count // num_packs, (num_packs, 1))  # the same everywhere: no matter for balance
    rest = count % num_packs
    room = np.full(num_packs, rest.sum() // num_packs)
    total = np.zeros(num_packs)
    experts = np.argsort(-weight, kind="stable")
    experts = experts[rest[experts] > 0]
    for done, expert in enumerate(experts, start=1):
        lightest = np.lexsort((-room, total, room == 0))[: rest[expert]]
        emptiest = np.lexsort((total, -room))[: rest[expert]]
        room_left = room.copy()
        room_left[lightest] -= 1
        chosen = lightest if _can_share(rest[experts[done:]], room_left) else emptiest
        packs[chosen, expert] += 1
        room[chosen] -= 1
        total[chosen] += weight[expert]
    return packs


def _can_share(count: IntArray, room: IntArray) -> bool:
    """True if `count` [n] replicas fit the room [packs], no two of an expert in one pack (Gale and Ryser).

    (2, 2) fill the room (2, 2), and not (3, 1): of a pack's three two would be of one expert.
    """
    if room.min() < 0:
        return False
    if count.max(initial=1) == 1:
        return True
    first = np.arange(1, len(count) + 1)
    most = np.minimum(room[:, None], first).sum(axis=0)  # that the first n experts can have
    return bool((np.cumsum(np.sort(count)[::-1]) <= most).all())


def _check_load(load: Numbers) -> None:
    if load.ndim != 2 or not load.shape[1]:
        raise InputError(f"load: has the shape {load.shape}; give [layers, experts], one expert at least")
    if not np.isfinite(load).all() or (load < 0).any():
        raise InputError("load: holds negative or non-finite values; give counts or shares of tokens")
