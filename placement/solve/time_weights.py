"""Prices of the search for time: what a row and an expert cost, and how much of a maximum is chance.

Shapes: T tokens, K = top_k, E experts of the layer, G ranks.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exflow.placement.plan.topology import Topology
from exflow.placement.time.serving import Serving

IntArray = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
Prices = tuple[float, float, float, float, float]  # near, far, and their noise; noise of work


@dataclass(frozen=True)
class Weights:
    """Microseconds of a layer for one unit of each quantity, in a batch of `tokens` tokens of all ranks.

    near, far: a row that the busiest rank receives from others, of all or of other nodes; far is 0 where one
    class of link does it all. share [E]: of the tokens that choose an expert. weights, pair: reading an
    expert, and one row of it. near_noise, far_noise: deviation of the rows that a rank or a node receives in
    a batch. work_noise: of a rank's work, microseconds.
    """

    topology: Topology
    tokens: int
    near: float
    far: float
    share: Floats
    weights: float
    pair: float
    near_noise: float
    far_noise: float
    work_noise: float

    def prices(self) -> Prices:
        """For `cost_us` with the rows of all owners by rank and node; the homes among them cost nothing."""
        where = self.topology
        near = self.near * (1 - 1 / where.num_ranks)
        far = (
            self.far * (1 - 1 / where.num_nodes) / where.gpus_per_node
        )  # a node's rows go over all its links
        return near, far, self.near_noise, self.far_noise, self.work_noise

    def prices_by_link(self) -> Prices:
        """For `cost_us` with the rows that cross alone, by rank and by link between nodes."""
        far_noise = self.far_noise / math.sqrt(self.topology.gpus_per_node)
        return self.near, self.far, self.near_noise, far_noise, self.work_noise

    def work(self, part: float = 1.0) -> Floats:
        """[E]: microseconds of an expert that serves this part of the owners."""
        touched = 1 - (1 - np.minimum(self.share, 1)) ** (self.tokens * part)
        return np.asarray(self.weights * touched + self.pair * self.share * self.tokens * part)


def weights_of(chosen: IntArray, num_experts: int, topology: Topology, serving: Serving) -> Weights:
    """The prices of a layer, from the experts [T, K] that its tokens chose."""
    machine, sizes = serving.machine.machine, serving.sizes
    ranks, nodes = topology.num_ranks, topology.num_nodes
    tokens, top_k = serving.batch * ranks, chosen.shape[1]
    share = np.bincount(chosen.ravel(), minlength=num_experts) / len(chosen)
    pair_us = 1e6 * sizes.operations / machine.flops_per_s
    weights_us = 1e6 * sizes.expert_bytes / machine.read_bytes_per_s
    touched = 1 - (1 - np.minimum(share, 1)) ** tokens
    untouched = math.sqrt(float((touched * (1 - touched)).sum()) / ranks)
    reach = _reach(top_k, ranks)
    near_link = machine.inside if ranks > nodes else machine.between
    row_us = 2e6 * sizes.row_bytes  # dispatch and combine
    return Weights(
        topology=topology,
        tokens=tokens,
        near=row_us / near_link.bytes_per_s,
        far=row_us / machine.between.bytes_per_s if 1 < nodes < ranks else 0.0,
        share=share,
        weights=weights_us,
        pair=pair_us,
        near_noise=math.sqrt(tokens * reach * (1 - reach)),
        far_noise=math.sqrt(tokens * _reach(top_k, nodes) * (1 - _reach(top_k, nodes))),
        work_noise=math.hypot(pair_us * math.sqrt(tokens * top_k / ranks), weights_us * untouched) + 1e-9,
    )


def _reach(top_k: int, parts: int) -> float:
    """Share of the tokens that choose some expert of a part, if choices were even and independent."""
    return min(max(1 - (1 - 1 / parts) ** top_k, 0.05), 0.95)
