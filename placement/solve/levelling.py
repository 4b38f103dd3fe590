"""Replicates and places experts so that GPUs are equally busy, by loads alone; never worse than DeepSeek's
EPLB.

The recipe is the published one: whole groups of experts go to nodes, each node's spare slots to its hottest
experts, and its replicas onto its GPUs, the heaviest first. Here the search begins with it, in single
precision, so that it begins with the very placement that EPLB finds. Then replicas, and groups, change places
as long as that relieves the busiest GPU. Replicas of an expert may share a GPU: there they shift load, too.

Shapes: L MoE layers, E experts, P slots. Of one node in one layer: n experts, s slots, g GPUs.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exflow.placement.solve.load_only import replica_counts

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
SingleArray = npt.NDArray[np.float32]

LEVEL = 1e-4  # of the mean: with so little above it the busiest GPU need not be relieved
LESS = 1 - 1e-9  # of the busiest load: what is more may be rounding
TRIES = 64  # exchanges of groups to look at in a layer; models have 8 groups, or 16


@dataclass(frozen=True, eq=False)
class _Node:
    """One node's part of a layer: its groups, and the experts [g, s / g] on each of its GPUs."""

    groups: IntArray
    experts: IntArray
    busiest: float  # the load of its busiest GPU
    most: int  # the replicas that EPLB would make of its hottest expert; `experts` has no more of any


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer: the loads [E], the experts [groups, size] of each group, and the slots and GPUs of a node."""

    load: FloatArray
    members: IntArray
    num_slots: int
    num_gpus: int

    def node(self, groups: IntArray) -> _Node:
        """Place the experts of these groups on one node."""
        experts = self.members[groups].ravel()
        load = self.load[experts]
        held, most = _replicated(load, self.num_slots, self.num_gpus)
        placed = [_placed(load, choice, self.num_gpus) for choice in held]
        busiest, slots = min(placed, key=lambda each: each[0])
        return _Node(groups, experts[slots], busiest, most)


def levelled(
    load: FloatArray, of_group: SingleArray, num_slots: int, num_nodes: int, num_gpus: int
) -> tuple[IntArray, int]:
    """The map [L, P] for loads [L, E], each GPU's experts ascending; and the most replicas EPLB would make of
    an expert.

    Those of this map are never more. A group's experts share a node; `of_group` [L, groups] are the sums of
    their loads, in any unit. Single precision must be able to hold the loads. The numbers must divide: groups
    and GPUs by nodes, experts by groups, slots by GPUs.
    """
    members = np.arange(load.shape[1]).reshape(of_group.shape[1], -1)
    slots, most = [], 1
    for row, sums in zip(load, of_group, strict=True):
        layer = _Layer(row, members, num_slots // num_nodes, num_gpus // num_nodes)
        nodes = [layer.node(groups) for groups in _packed(sums, num_nodes)]
        most = max(most, *(node.most for node in nodes))
        slots.append([np.sort(node.experts, axis=1) for node in _regrouped(layer, nodes)])
    return np.reshape(slots, (len(load), num_slots)), most


def _regrouped(layer: _Layer, nodes: list[_Node]) -> list[_Node]:
    """The nodes after exchanges of two groups, each of which relieves the busiest GPU."""
    nodes, tries = nodes.copy(), TRIES
    most = max(node.most for node in nodes)
    of_group = layer.load[layer.members].sum(axis=1)
    enough = of_group.sum() / (len(nodes) * layer.num_gpus) * (1 + LEVEL)
    while True:
        hot = max(range(len(nodes)), key=lambda node: nodes[node].busiest)
        busiest = nodes[hot].busiest
        for total, other, ours, theirs in sorted(_exchanges(of_group, nodes, hot)):
            if busiest <= enough or total / layer.num_gpus >= busiest or not tries:
                return nodes
            tries -= 1
            groups = np.stack([nodes[hot].groups, nodes[other].groups])
            groups[0, ours], groups[1, theirs] = groups[1, theirs], groups[0, ours]
            pair = [layer.node(each) for each in groups]
            if all(node.busiest < busiest * LESS and node.most <= most for node in pair):
                nodes[hot], nodes[other] = pair
                break
        else:
            return nodes


def _exchanges(of_group: FloatArray, nodes: list[_Node], hot: int) -> Iterator[tuple[float, int, int, int]]:
    """Each group of node `hot` for each of another: the larger of their loads then, and which they are."""
    total = [of_group[node.groups].sum() for node in nodes]
    for other, node in enumerate(nodes):
        if other == hot or len(node.groups) == 1:
            continue
        for ours, group in enumerate(nodes[hot].groups):
            for theirs, wanted in enumerate(node.groups):
                less = of_group[group] - of_group[wanted]
                yield max(total[hot] - less, total[other] + less), other, ours, theirs


def _replicated(load: FloatArray, num_slots: int, num_gpus: int) -> tuple[list[IntArray], int]:
    """Choices for the experts in the slots [s], with EPLB's last, and how many replicas EPLB makes of the
    hottest.

    Where those are more than the GPUs, which makes GPUs uneven, the first choice is one a GPU.
    """
    hottest = _hottest(load.astype(np.float32), num_slots)
    most = int(np.bincount(hottest).max())
    if load.any() and most <= num_gpus:
        return [hottest], most
    # EPLB gives all spare slots of a node without load to one expert; as nothing is known, all get alike.
    known = load if load.any() else np.ones_like(load)
    spread = np.repeat(np.arange(len(load)), replica_counts(known[None], num_slots, num_gpus)[0])
    return [spread, hottest] if load.any() else [spread], most


def _hottest(load: SingleArray, num_slots: int) -> IntArray:
    """[s]: every expert of `load` [n] once, then slot by slot the one with the most load per replica."""
    count = np.ones(len(load), dtype=np.float32)
    held = list(range(len(load)))
    heap = [(-each, expert) for expert, each in enumerate(load)]  # of equals the first expert
    heapq.heapify(heap)
    for _ in range(num_slots - len(load)):
        expert = heap[0][1]
        held.append(expert)
        count[expert] += 1
        heapq.heapreplace(heap, (-load[expert] / count[expert], expert))
    return np.array(held)


def _placed(load: FloatArray, held: IntArray, num_gpus: int) -> tuple[float, IntArray]:
    """The load of the busiest GPU, and the experts [g, s / g] of `held` [s] on each, for loads [n]."""
    count = np.bincount(held)
    weight = (load / count)[held]
    single = np.divide(load, count, dtype=np.float32)
    packs = _swapped(weight, _packed(single[held], num_gpus))
    return float(weight[packs].sum(axis=1).max()), held[packs]


def _packed(weight: SingleArray, num_packs: int) -> IntArray:
    """[packs, items / packs]: the heaviest item first, each into the lightest pack with room."""
    room = len(weight) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(np.float32(0), pack) for pack in range(num_packs)]  # of equals the first pack
    for item in np.argsort(-weight, kind="stable"):
        total, pack = heap[0]
        packs[pack].append(item)
        if len(packs[pack]) < room:
            heapq.heapreplace(heap, (total + weight[item], pack))
        else:
            heapq.heappop(heap)
    return np.array(packs)


def _swapped(weight: FloatArray, packs: IntArray) -> IntArray:
    """`packs` [packs, n] after swaps of two items, each the best that relieves the heaviest pack."""
    packs = packs.copy()
    held = weight[packs]
    total = held.sum(axis=1)
    enough = total.mean() * (1 + LEVEL)
    while (most := total.max()) > enough:
        heaviest = int(total.argmax())
        less = held[heaviest][:, None, None] - held
        after = np.maximum(most - less, total[:, None] + less)
        after[:, heaviest] = most
        item, pack, other = np.unravel_index(after.argmin(), after.shape)
        if after[item, pack, other] >= most * LESS:
            break
        for values in (packs, held):
            values[heaviest, item], values[pack, other] = values[pack, other], values[heaviest, item]
        total[[heaviest, pack]] = held[[heaviest, pack]].sum(axis=1)
    return packs
