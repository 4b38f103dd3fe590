"""The drop-in for rebalance_experts with what it can know of routing: affinity, or a trace."""

import numpy as np
import pytest
import torch

from exflow.errors import InputError
from exflow.placement.counts.affinity import AffinityCounts, count_affinity
from exflow.placement.eplb import rebalance_experts
from exflow.placement.fastest_plan import place_for_time
from exflow.placement.plan.topology import Topology
from exflow.placement.time.serving import Serving
from exflow.profiling.trace import RoutingTrace
from tests.placement.planted import planted


def pairs() -> AffinityCounts:
    """Each token selects e and e + 4 of eight experts: four pairs, in two layers, one of them shuffled."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, 400)
    shuffle = np.array([3, 1, 4, 0, 5, 2, 7, 6])
    experts = np.stack(
        [np.stack([first, first + 4], axis=1), shuffle[np.stack([first, first + 4], axis=1)]], 1
    )
    return count_affinity(RoutingTrace.from_arrays(experts, num_experts=8))


def test_affinity_keeps_together_what_is_selected_together() -> None:
    affinity = pairs()
    slots, _, _ = rebalance_experts(affinity.load, 8, 1, 1, 4, affinity)
    for layer, partners in zip(slots.reshape(2, 4, 2), affinity.intra, strict=True):
        assert all(partners[one, other] for one, other in layer.tolist())
    again, _, _ = rebalance_experts(affinity.load, 8, 1, 1, 4, affinity)
    assert np.array_equal(slots, again)


def test_no_time_at_all_still_gives_a_placement() -> None:
    slots, _, _ = rebalance_experts(np.ones((2, 8)), 8, 1, 1, 4, pairs(), time_limit=0)
    assert np.sort(slots, axis=1).tolist() == [list(range(8))] * 2


def test_with_affinity_replicas_follow_the_weights_given() -> None:
    weight = torch.ones(2, 8)
    weight[0, 5] = 100
    weight[1] = 0  # never seen
    slots, physical, count = rebalance_experts(weight, 12, 1, 2, 4, pairs())
    assert count[0].tolist() == [2, 1, 1, 1, 1, 4, 1, 1]
    assert (slots[0].view(4, 3) == 5).any(dim=1).all()
    assert physical.shape == (2, 8, 4)


def test_with_a_trace_the_plan_has_the_least_time() -> None:
    trace, _ = planted(hot=0.7, tokens=400)
    load = np.stack([np.bincount(trace.experts[:, layer].ravel(), minlength=16) for layer in range(3)])
    slots, _, count = rebalance_experts(load, 20, 1, 1, 4, trace=trace)
    plan = place_for_time(trace, Topology(gpus_per_node=4), Serving("eplb"), redundant_experts=4)
    assert np.array_equal(slots, plan.physical_to_logical_map)
    assert count.sum() == 3 * 20
    with pytest.raises(InputError, match="trace: has 3 MoE layers of 16 experts, weight has the shape"):
        rebalance_experts(load[:2], 20, 1, 1, 4, trace=trace)
    with pytest.raises(InputError, match="affinity and trace both say"):
        rebalance_experts(load, 20, 1, 1, 4, affinity=count_affinity(trace), trace=trace)
