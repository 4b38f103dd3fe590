"""A drop-in for DeepSeek's rebalance_experts: its arguments, its results, and what affinity adds."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.affinity import AffinityCounts, count_affinity
from exflow.placement.eplb import logical_maps, rebalance_experts
from exflow.profiling.trace import RoutingTrace

Case = tuple[np.ndarray, int, int, int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Loads [L, E], replicas, groups, nodes and GPUs that fit each other, as the original demands."""
    num_nodes = draw(st.integers(1, 3))
    num_gpus = num_nodes * draw(st.integers(1, 3))
    num_groups = draw(st.integers(1, 2)) * draw(st.sampled_from([1, num_nodes]))
    num_experts = num_groups * draw(st.integers(1, 4))
    least = max(-(-num_experts // num_gpus), 1)
    num_replicas = num_gpus * (least + draw(st.integers(0, 3)))
    row = st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts)
    weight = np.array(draw(st.lists(row, min_size=1, max_size=2)))
    return weight, num_replicas, num_groups, num_nodes, num_gpus


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_the_three_results_say_the_same_and_groups_stay_on_nodes(case: Case) -> None:
    weight, num_replicas, num_groups, num_nodes, _ = case
    slots, physical, count = rebalance_experts(*case)
    assert slots.dtype == physical.dtype == count.dtype == np.int64
    assert slots.shape == (len(weight), num_replicas)
    assert physical.shape == (*weight.shape, count.max())
    assert count.sum(axis=1).tolist() == [num_replicas] * len(weight)
    assert count.min() >= 1
    for layer, row in enumerate(slots):
        for expert in range(weight.shape[1]):
            places = physical[layer, expert]
            assert places[: count[layer, expert]].tolist() == np.flatnonzero(row == expert).tolist()
            assert (places[count[layer, expert] :] == -1).all()
        if num_groups % num_nodes == 0:
            group = row // (weight.shape[1] // num_groups)
            for node in group.reshape(num_nodes, -1):
                assert len(set(node.tolist())) == num_groups // num_nodes


def test_logical_maps_of_the_example() -> None:
    physical, count = logical_maps(np.array([[1, 0, 1]]), 2)
    assert physical.tolist() == [[[1, -1], [0, 2]]]
    assert count.tolist() == [[1, 2]]


def test_its_arguments_are_those_of_the_original() -> None:
    names = list(inspect.signature(rebalance_experts).parameters)
    assert names == [
        "weight",
        "num_replicas",
        "num_groups",
        "num_nodes",
        "num_gpus",
        "affinity",
        "time_limit",
    ]


def test_hot_groups_go_to_different_nodes_and_the_hottest_expert_gets_the_replicas() -> None:
    """Groups (0, 1), (2, 3), ...: of 90, 80, 9 and 1; two nodes get 91 and 89."""
    weight = np.array([[80, 10, 70, 10, 5, 4, 1, 0]])
    slots, _, count = rebalance_experts(weight, 12, 4, 2, 4)
    left, right = slots[0].reshape(2, 6)
    assert {0, 1, 6, 7} == set(left.tolist())
    assert {2, 3, 4, 5} == set(right.tolist())
    assert count[0, 0] == count[0, 2] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.float64])
def test_tensors_in_tensors_out(dtype: Any) -> None:
    weight = np.random.default_rng(0).integers(0, 200, (3, 16))
    arrays = rebalance_experts(weight, 24, 4, 2, 4)
    results = rebalance_experts(torch.tensor(weight).to(dtype), 24, 4, 2, 4)
    for tensor, array in zip(results, arrays, strict=True):
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.dtype, tensor.device.type) == (torch.int64, "cpu")
        assert torch.equal(tensor, torch.from_numpy(array))


def test_a_weight_that_needs_gradients_is_only_read() -> None:
    weight = torch.rand(2, 8, requires_grad=True)
    assert not any(result.requires_grad for result in rebalance_experts(weight, 8, 1, 1, 2))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 1, 1, 4), "num_replicas is 10, num_gpus is 4; give a multiple"),
        ((12, 1, 3, 4), "num_gpus is 4, num_nodes is 3; give a multiple"),
        ((8, 3, 1, 4), "the number of experts is 8, num_groups is 3; give a multiple"),
        ((4, 1, 1, 4), "num_replicas is 4 for 8 experts; give as many at least"),
        ((8, 0, 1, 4), "num_groups is 0; give 1 or more"),
        ((8, 1, 0, 4), "num_nodes is 0; give 1 or more"),
        ((8, 1, 1, 0), "num_gpus is 0; give 1 or more"),
    ],
)
def test_numbers_that_contradict_each_other(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rebalance_experts(np.ones((2, 8)), *arguments)


def test_weights_that_are_none() -> None:
    with pytest.raises(InputError, match=r"weight: has the shape \(8,\); give \[layers, experts\]"):
        rebalance_experts(np.ones(8), 8, 1, 1, 4)
    for affinity in (None, pairs()):
        with pytest.raises(InputError, match="load: holds negative or non-finite values"):
            rebalance_experts(np.full((2, 8), np.nan), 8, 1, 1, 4, affinity)
    with pytest.raises(InputError, match=r"affinity: its loads have the shape \(2, 8\), weight has \(3, 8\)"):
        rebalance_experts(np.ones((3, 8)), 8, 1, 1, 4, pairs())
