"""GRACE-MoE's idea: groups of experts that tokens select together, one group a GPU; replicas of the hottest.

Our own program of the published idea (Han et al. 2025, arXiv 2509.25041): spectral clustering of each layer's
experts, first into nodes, then into the GPUs of each node. Groups are equal here, since engines give every
GPU the same number of slots; the paper lets their sizes differ by a little. Replicas go onto the GPUs with
least load. The paper routes a token to a replica on its own GPU first, as SGLang's static rule does.

Shapes: L MoE layers, E experts, P slots, G GPUs.
"""

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from exflow.placement.counts.affinity import AffinityCounts
from exflow.placement.plan.topology import Topology

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
STARTS, ROUNDS = 4, 20  # of the clustering; the start that keeps most pairs together wins


def grouped_slots(counts: AffinityCounts, topology: Topology, num_slots: int) -> Ints:
    """[L, P]: the expert in each slot, GPU after GPU. The GPUs must share experts and slots equally."""
    per_rank = num_slots // topology.num_ranks
    return np.stack(
        [
            with_replicas(rank_of_expert(together, topology), load, topology.num_ranks, per_rank)
            for together, load in zip(counts.intra, counts.load, strict=True)
        ]
    )


def rank_of_expert(together: Ints, topology: Topology) -> Ints:
    """[E]: the GPU of each expert of a layer, from the tokens [E, E] that select two experts together."""
    inside = topology.gpus_per_node
    rank = equal_groups(together, topology.num_nodes) * inside
    for first in range(0, topology.num_ranks, inside):
        here = np.flatnonzero(rank == first)
        rank[here] = first + equal_groups(together[np.ix_(here, here)], inside)
    return rank


def equal_groups(together: Ints, num_groups: int) -> Ints:
    """[E]: the group of each expert, by spectral clustering into groups of equal size."""
    if num_groups == 1:
        return np.zeros(len(together), dtype=np.int64)
    points, rng = spectral_points(together, num_groups), np.random.default_rng(0)
    starts = [rng.choice(len(points), num_groups, replace=False) for _ in range(STARTS)]
    found = [equal_clusters(points, points[start]) for start in starts]
    return max(found, key=lambda group: int(together[group[:, None] == group].sum()))


def spectral_points(together: Ints, dimensions: int) -> Floats:
    """[E, dimensions]: the experts in the largest eigenvectors of the normalised counts, on the unit
    sphere."""
    scale = 1 / np.sqrt(np.maximum(together.sum(axis=1), 1))
    largest = [len(together) - dimensions, len(together) - 1]
    points = eigh(together * np.outer(scale, scale), subset_by_index=largest)[1]
    return np.asarray(points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12))


def equal_clusters(points: Floats, centres: Floats) -> Ints:
    """[E]: the cluster of each point, by k-means whose clusters are filled by an assignment problem."""
    size, cluster = len(points) // len(centres), np.full(len(points), -1)
    for _ in range(ROUNDS):
        seats = np.repeat(cdist(points, centres, "sqeuclidean"), size, axis=1)
        before, cluster = cluster, linear_sum_assignment(seats)[1] // size
        if np.array_equal(before, cluster):
            break
        centres = np.stack([points[cluster == each].mean(axis=0) for each in range(len(centres))])
    return cluster


def with_replicas(rank: Ints, load: Ints, num_ranks: int, per_rank: int) -> Ints:
    """[P]: the experts of a layer, GPU after GPU, with replicas in all spare slots.

    The expert with most load per replica comes first, onto the GPU with least load that lacks it.
    """
    hosts = rank == np.arange(num_ranks)[:, None]  # [G, E]
    while (room := hosts.sum(axis=1) < per_rank).any():
        share, free = load / hosts.sum(axis=0), room[:, None] & ~hosts
        expert = np.where(free.any(axis=0), share, -1).argmax()
        hosts[np.where(free[:, expert], hosts @ share, np.inf).argmin(), expert] = True
    return np.nonzero(hosts)[1]
