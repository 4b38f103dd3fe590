"""A drop-in for DeepSeek's rebalance_experts: its arguments, its results, and what affinity adds."""

import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.eplb import rebalance_experts
from exflow.placement.plan.logical_maps import logical_maps
from tests.placement.test_eplb_routing import pairs

Case = tuple[np.ndarray, int, int, int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Loads [L, E], replicas, groups, nodes and GPUs that fit each other, as the original demands."""
    num_nodes = draw(st.integers(1, 3))
    num_groups = draw(st.integers(1, 2)) * draw(st.sampled_from([1, num_nodes]))
    if num_groups % num_nodes:  # nobody looks at them
        num_gpus = draw(st.integers(1, 9))
        num_experts = draw(st.integers(1, 16))
    else:
        num_gpus = num_nodes * draw(st.integers(1, 3))
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
    assert physical.shape[:2] == weight.shape
    assert physical.shape[2] >= count.max()
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


def busiest(weight: np.ndarray, slots: np.ndarray, num_gpus: int) -> np.ndarray:
    """[L]: the load of the busiest GPU, where an expert's replicas share its load."""
    count = np.stack([np.bincount(row, minlength=weight.shape[1]) for row in slots])
    share = np.take_along_axis(weight / count, slots, axis=1)
    return np.asarray(share.reshape(len(slots), num_gpus, -1).sum(axis=2).max(axis=1))


def greedy(weights: list[tuple[np.float32, int]], room: list[int]) -> list[list[int]]:
    """Ids by pack: the heaviest first, each to the lightest pack with room, the first of equals."""
    packs: list[list[int]] = [[] for _ in room]
    total = [np.float32(0)] * len(room)
    for weight, item in sorted(weights, key=lambda each: -each[0]):
        free = [pack for pack in range(len(room)) if len(packs[pack]) < room[pack]]
        pack = min(free, key=lambda each: total[each])
        packs[pack].append(item)
        total[pack] += weight
    return packs


def published_recipe(case: Case) -> tuple[list[float], int]:
    """The busiest GPU's load in each layer as EPLB is described, and the most replicas of an expert."""
    weight, num_replicas, num_groups, num_nodes, num_gpus = case
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size, loads, most = weight.shape[1] // num_groups, [], 1
    for row in weight.astype(np.float32):
        sums = [(row[group * size : (group + 1) * size].sum(), group) for group in range(num_groups)]
        gpus = []
        for groups in greedy(sums, [num_groups // num_nodes] * num_nodes):
            held = [group * size + place for group in groups for place in range(size)]
            experts, count = tuple(held), dict.fromkeys(held, 1)
            while len(held) < num_replicas // num_nodes:
                hottest = max(experts, key=lambda expert: row[expert] / np.float32(count[expert]))
                held.append(hottest)
                count[hottest] += 1
            shares = [(row[expert] / np.float32(count[expert]), expert) for expert in held]
            packs = greedy(shares, [num_replicas // num_gpus] * (num_gpus // num_nodes))
            gpus += [sum(float(row[expert]) / count[expert] for expert in pack) for pack in packs]
            most = max(most, *count.values())
        loads.append(max(gpus))
    return loads, most


@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_never_worse_than_the_published_recipe_and_as_wide(case: Case) -> None:
    expected, most = published_recipe(case)
    slots, physical, _ = rebalance_experts(*case)
    assert (busiest(case[0], slots, case[4]) <= np.array(expected) * (1 + 1e-9)).all()
    assert physical.shape[2] == most


LOADS: dict[str, Callable[[float], float]] = {
    "uniform": lambda u: int(1000 * u),
    "ties": lambda u: int(4 * u),
    "skewed": lambda u: int(1 / (u + 0.0005)),
    "sparse": lambda u: int(1000 * max(u - 0.8, 0)),
    "shares": lambda u: u * u * u * u,
}


# (experts, replicas, groups, nodes, GPUs), loads, and what deepseek-ai/EPLB d52c72d comes to for them: the
# busiest GPU's load over the mean in each of three layers, and the third dimension of its
# logical_to_physical_map.
ORIGINAL: list[tuple[tuple[int, int, int, int, int], str, list[float], int]] = [
    ((12, 16, 4, 2, 8), "uniform", [1.117192, 1.515562, 1.099897], 2),
    ((12, 16, 4, 2, 8), "ties", [1.043478, 1.176471, 1.333333], 2),
    ((12, 16, 4, 2, 8), "skewed", [2.344149, 1.469388, 1.495935], 3),
    ((12, 16, 4, 2, 8), "sparse", [1.787546, 2.666667, 2.278481], 3),
    ((12, 16, 4, 2, 8), "shares", [1.281806, 1.911721, 1.637454], 3),
    ((256, 288, 8, 4, 32), "uniform", [1.04483, 1.025993, 1.027353], 2),
    ((256, 288, 8, 4, 32), "ties", [1.082707, 1.092896, 1.029491], 2),
    ((256, 288, 8, 4, 32), "skewed", [2.957169, 1.206865, 1.230769], 9),
    ((256, 288, 8, 4, 32), "sparse", [1.139394, 1.18254, 1.227677], 3),
    ((256, 288, 8, 4, 32), "shares", [1.056241, 1.06072, 1.169254], 2),
    ((256, 320, 8, 40, 320), "uniform", [1.928389, 1.856405, 1.891118], 2),
    ((256, 320, 8, 40, 320), "ties", [2.406015, 1.748634, 1.715818], 2),
    ((256, 320, 8, 40, 320), "skewed", [3.878336, 2.511292, 2.826211], 34),
    ((256, 320, 8, 40, 320), "sparse", [4.020202, 3.571429, 3.504703], 4),
    ((256, 320, 8, 40, 320), "shares", [2.420961, 2.454538, 2.537284], 3),
    ((64, 96, 8, 2, 16), "uniform", [1.084713, 1.052036, 1.074161], 2),
    ((64, 96, 8, 2, 16), "ties", [1.100917, 1.066667, 1.166667], 3),
    ((64, 96, 8, 2, 16), "skewed", [1.127293, 1.066411, 1.148289], 16),
    ((64, 96, 8, 2, 16), "sparse", [1.08692, 1.265176, 1.348273], 12),
    ((64, 96, 8, 2, 16), "shares", [1.051524, 1.0717, 1.036464], 5),
    ((16, 48, 16, 4, 8), "uniform", [1.070934, 1.056008, 1.022262], 6),
    ((16, 48, 16, 4, 8), "ties", [1.155556, 1.11828, 1.066667], 5),
    ((16, 48, 16, 4, 8), "skewed", [1.24109, 1.639847, 1.333333], 9),
    ((16, 48, 16, 4, 8), "sparse", [1.561997, 2.571166, 2.195122], 9),
    ((16, 48, 16, 4, 8), "shares", [1.109053, 1.141037, 1.096245], 9),
    ((60, 64, 3, 2, 8), "uniform", [1.007253, 1.008412, 1.007635], 2),
    ((60, 64, 3, 2, 8), "ties", [1.012048, 1.063291, 1.030928], 2),
    ((60, 64, 3, 2, 8), "skewed", [1.029703, 1.018727, 1.022422], 4),
    ((60, 64, 3, 2, 8), "sparse", [1.336161, 1.350649, 1.099669], 2),
    ((60, 64, 3, 2, 8), "shares", [1.001529, 1.001779, 1.002055], 2),
    ((8, 24, 2, 4, 12), "uniform", [1.070575, 1.177215, 1.050708], 7),
    ((8, 24, 2, 4, 12), "ties", [1.142857, 1.2, 1.107692], 7),
    ((8, 24, 2, 4, 12), "skewed", [1.097143, 1.090909, 1.18862], 13),
    ((8, 24, 2, 4, 12), "sparse", [1.411765, 1.411765, 0.0], 17),
    ((8, 24, 2, 4, 12), "shares", [1.216775, 1.259876, 1.170439], 12),
    ((30, 48, 4, 3, 8), "uniform", [1.029655, 1.022822, 1.055943], 3),
    ((30, 48, 4, 3, 8), "ties", [1.037037, 1.061224, 1.073171], 3),
    ((30, 48, 4, 3, 8), "skewed", [1.025493, 1.027832, 1.009259], 15),
    ((30, 48, 4, 3, 8), "sparse", [1.098881, 1.026667, 1.148538], 12),
    ((30, 48, 4, 3, 8), "shares", [1.033487, 1.040694, 1.019642], 8),
]


@pytest.mark.parametrize(("shape", "kind", "original", "width"), ORIGINAL)
def test_never_worse_than_the_original_and_as_wide(
    shape: tuple[int, int, int, int, int], kind: str, original: list[float], width: int
) -> None:
    num_experts, *numbers, num_gpus = shape
    rng = random.Random(f"{kind} {num_experts}")  # the same on every machine
    weight = np.array([[LOADS[kind](rng.random()) for _ in range(num_experts)] for _ in range(3)], float)
    slots, physical, _ = rebalance_experts(weight, *numbers, num_gpus)
    over_mean = busiest(weight, slots, num_gpus) / np.maximum(weight.sum(axis=1) / num_gpus, 1e-9)
    assert (over_mean <= np.array(original) + 1e-6).all()
    assert physical.shape == (3, num_experts, width)


def test_two_replicas_share_a_gpu_where_that_is_more_level() -> None:
    """16 in all: (8) and (5, 3) are level, while one replica a GPU leaves 9 and 7."""
    slots, _, count = rebalance_experts(np.array([[8, 5, 3]]), 4, 1, 1, 2)
    assert slots.tolist() == [[1, 2, 0, 0]]
    assert count.tolist() == [[2, 1, 1]]


def test_one_replica_a_gpu_where_that_is_more_level() -> None:
    """The recipe gives the hot expert nine replicas, three of them to one of four GPUs."""
    weight = np.array([[800, 1, 1, 1, 1, 1, 1, 1]])
    slots, physical, count = rebalance_experts(weight, 16, 1, 1, 4)
    assert count[0, 0] == 4
    assert busiest(weight, slots, 4)[0] == 202  # with nine over 266
    assert physical.shape == (1, 8, 9)


def test_all_experts_get_the_spare_slots_of_a_layer_without_load() -> None:
    """The original gives all to one, and as wide a map."""
    _, physical, count = rebalance_experts(np.zeros((1, 8)), 16, 1, 1, 4)
    assert count.tolist() == [[2] * 8]
    assert physical.shape == (1, 8, 9)


@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1, 1e38, 1e300])
def test_the_unit_of_loads_does_not_matter(scale: float) -> None:
    weight = np.random.default_rng(0).integers(0, 99, (2, 16)).astype(float)
    expected = rebalance_experts(weight, 24, 4, 2, 4)
    for found, other in zip(rebalance_experts(weight * scale, 24, 4, 2, 4), expected, strict=True):
        assert found.tolist() == other.tolist()


@pytest.mark.parametrize(
    ("num_experts", "numbers"),
    [
        (8, (12, 1, 3, 4)),  # 3 nodes divide neither 1 group nor 4 GPUs
        (8, (12, 3, 2, 4)),  # 3 groups of 8 experts
        (60, (64, 3, 2, 8)),
        (64, (70, 5, 3, 7)),
        (8, (12, 4, 5, 4)),  # more nodes than GPUs
        (8, (8, 8, 16, 8)),
        (7, (8, 2, 4, 2)),
    ],
)
def test_nodes_that_do_not_divide_groups_are_not_looked_at(
    num_experts: int, numbers: tuple[int, int, int, int]
) -> None:
    weight = np.random.default_rng(0).random((3, num_experts))
    num_replicas, _, _, num_gpus = numbers
    expected = rebalance_experts(weight, num_replicas, 1, 1, num_gpus)
    for found, other in zip(rebalance_experts(weight, *numbers), expected, strict=True):
        assert found.tolist() == other.tolist()


def test_logical_maps_of_the_example() -> None:
    physical, count = logical_maps(np.array([[1, 0, 1]]), 2)
    assert physical.tolist() == [[[1, -1], [0, 2]]]
    assert logical_maps(np.array([[1, 0, 1]]), 2, 3)[0].tolist() == [[[1, -1, -1], [0, 2, -1]]]
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
        "trace",
        "serving",
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 1, 1, 4), "num_replicas is 10, num_gpus is 4; give a multiple"),
        ((12, 3, 3, 4), "num_gpus is 4, num_nodes is 3; give a multiple"),
        ((10, 1, 2, 4), "num_replicas is 10, num_gpus is 4; give a multiple"),
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
        with pytest.raises(InputError, match="weight: holds negative or non-finite values"):
            rebalance_experts(np.full((2, 8), np.nan), 8, 1, 1, 4, affinity)
    with pytest.raises(InputError, match=r"affinity: its loads have the shape \(2, 8\), weight has \(3, 8\)"):
        rebalance_experts(np.ones((3, 8)), 8, 1, 1, 4, pairs())
