"""Placements to compare with: the engines' default, and chance."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.replicas import equal_slots
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace


def contiguous(num_layers: int, num_experts: int, num_ranks: int) -> npt.NDArray[np.int64]:
    """rank_of_expert [num_layers, num_experts]: the first E/G experts of every layer on rank 0, and so on.

    Raises InputError if the ranks do not share the experts equally.
    """
    ranks = np.arange(num_experts) // _experts_per_rank(num_experts, num_ranks)
    return np.tile(ranks, (num_layers, 1))


def contiguous_slots(experts_per_layer: Sequence[int], num_slots: int) -> npt.NDArray[np.int64]:
    """[num_layers, num_slots] the expert in each slot: in order; spare slots begin again with expert 0."""
    return np.stack([np.arange(num_slots) % num_experts for num_experts in experts_per_layer])


def contiguous_plan(
    trace: RoutingTrace, topology: Topology, strategy: Strategy, num_slots: int | None = None
) -> Plan:
    """The plan that engines use unless told otherwise: the first experts of every layer on the first GPU.

    num_slots: of each layer; by default the least number, at least that of experts, that the GPUs share
    equally.
    """
    num_slots = num_slots or equal_slots(trace.num_experts, topology.num_ranks)
    slots = contiguous_slots(trace.experts_per_layer, num_slots)
    return Plan.of_slots(slots, topology, trace, method="contiguous", strategy=strategy)


def random(num_layers: int, num_experts: int, num_ranks: int, seed: int) -> npt.NDArray[np.int64]:
    """rank_of_expert [num_layers, num_experts]: each layer an independent random split into equal parts.

    The same seed gives the same placement. Raises InputError if the ranks do not share the experts equally.
    """
    return np.random.default_rng(seed).permuted(contiguous(num_layers, num_experts, num_ranks), axis=1)


def _experts_per_rank(num_experts: int, num_ranks: int) -> int:
    if num_ranks < 1 or num_experts < 1 or num_experts % num_ranks:
        raise InputError(
            f"{num_experts} experts cannot be shared equally by {num_ranks} ranks; "
            "choose a number of ranks that divides the number of experts"
        )
    return num_experts // num_ranks
