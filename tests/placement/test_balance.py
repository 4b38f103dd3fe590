import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.solve import start as balance
from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.exact import _balanced_partitions
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.solve.start import balanced_start, level, part_loads, spread, start_inside

ProblemFactory = Callable[..., PlacementProblem]

SMALL = st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (5, 5), (4, 1)])


def loaded(load: list[list[int]], num_parts: int, max_load: float) -> PlacementProblem:
    loads = np.array(load, dtype=np.float64)
    layers, experts = loads.shape
    return PlacementProblem(
        np.zeros((layers - 1, experts, experts)),
        np.zeros((layers, experts, experts)),
        loads,
        num_parts,
        np.array([max_load], dtype=np.float64),
    )


def least_busiest(load: np.ndarray, num_parts: int) -> float:
    """Return the least load of the busiest part, by brute force over all partitions."""
    partitions = _balanced_partitions(len(load), num_parts)
    return min(float(part_loads(load, parts, num_parts).max()) for parts in partitions)


def test_contiguous_is_kept_where_it_keeps_the_cap() -> None:
    problem = loaded([[2, 2, 2, 2], [9, 9, 1, 1]], num_parts=2, max_load=10)
    start = balanced_start(problem)
    assert start[0].tolist() == [0, 0, 1, 1]
    assert problem.part_loads(start).tolist() == [[4, 4], [10, 10]]


def test_the_error_names_the_hardest_layer_and_the_least_that_it_can_have() -> None:
    load = [[1, 1, 1, 1], [7, 1, 1, 1], [3, 1, 1, 1]]  # a hot expert never gets less than one mate: 8 and 4
    with pytest.raises(InputError) as error:
        balanced_start(loaded(load, num_parts=2, max_load=2))
    assert str(error.value) == (
        "max imbalance 0.4 cannot be kept: the least found for MoE layer 1 is 1.6000 times the mean load; "
        "choose 1.6000 or more"
    )


@given(shape=SMALL, seed=st.integers(0, 10**6), layers=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_least_is_the_least_of_all_partitions_and_works(
    shape: tuple[int, int], seed: int, layers: int
) -> None:
    experts, num_parts = shape
    rng = np.random.default_rng(seed)
    load = np.round(rng.pareto(1.0, (layers, experts)) * 10) + 1
    mean = load.sum(axis=1, keepdims=True) / num_parts
    problem = loaded((load / mean * 1000).tolist(), num_parts, max_load=999.0)  # the mean is 1000
    with pytest.raises(InputError) as error:
        balanced_start(problem)
    found = re.search(r"choose ([\d.]+) or more", str(error.value))
    assert found
    needed = max(least_busiest(row, num_parts) for row in problem.load) / 1000
    assert needed <= float(found[1]) + 1e-9
    assert float(found[1]) < needed + 1.01e-4
    capped = replace(problem, max_load=np.full(layers, float(found[1]) * 1000 + 1e-6))
    assert capped.is_feasible(balanced_start(capped))


@pytest.mark.parametrize("program_size", [0, balance._MAX_PROGRAM])
def test_large_layers_come_near_the_mean(monkeypatch: pytest.MonkeyPatch, program_size: int) -> None:
    monkeypatch.setattr(balance, "_MAX_PROGRAM", program_size)
    load = np.random.default_rng(0).integers(50, 150, (2, 64)).astype(np.float64)
    mean = load.sum(axis=1) / 8
    problem = loaded(load.tolist(), num_parts=8, max_load=float(np.ceil(mean.max())) + 2)
    assert problem.is_feasible(balanced_start(problem))


def test_the_program_finds_what_swaps_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "_RANDOM_STARTS", 0)
    load = np.array(
        [8.0, 7, 6, 5, 4, 0]
    )  # 15 = 8+7+0 = 6+5+4: a single swap from 8+5+4 and 7+6+0 does not help
    stuck = spread(load, 2, 15)
    exact = balance._spread_exactly(load, 2, stuck)
    assert part_loads(load, exact, 2).max() == 15


def test_level_stops_at_the_cap_and_leaves_its_argument() -> None:
    load, parts = np.array([4.0, 3, 2, 1]), np.array([0, 0, 1, 1])
    assert level(load, parts, 2, 7).tolist() == [0, 0, 1, 1]
    assert part_loads(load, level(load, parts, 2, 6), 2).max() <= 6
    assert part_loads(load, level(load, parts, 2, 0), 2).tolist() == [5, 5]
    assert parts.tolist() == [0, 0, 1, 1]


def test_spread_is_the_same_each_time() -> None:
    load = np.random.default_rng(1).integers(1, 1000, 24).astype(np.float64)
    assert np.array_equal(spread(load, 4, 0), spread(load, 4, 0))


def test_inside_start_follows_the_nodes_where_the_gpus_have_room() -> None:
    problem = loaded([[5, 1, 1, 5, 1, 1, 1, 1]], num_parts=4, max_load=6)
    flat = balanced_start(problem)
    node = np.array([[0, 0, 0, 0, 1, 1, 1, 1]])  # 12 and 4: each node can be split
    start = start_inside(problem, node, flat)
    assert problem.is_feasible(start)
    assert np.array_equal(start // 2, node)


def test_inside_start_moves_experts_between_nodes_where_it_must() -> None:
    problem = loaded([[5, 5, 5, 1, 1, 1, 1, 1]], num_parts=4, max_load=6)
    node = np.array([[0, 0, 0, 1, 0, 1, 1, 1]])  # three hot experts on two GPUs
    start = start_inside(problem, node, balanced_start(problem))
    assert problem.is_feasible(start)
    assert (start // 2 != node).sum() == 2


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_inside_start_is_feasible_for_any_nodes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load = rng.integers(1, 100, (3, 16)).tolist()
    loose = loaded(load, num_parts=4, max_load=np.inf)
    tightest = loose.part_loads(np.stack([spread(row, 4, 0) for row in loose.load])).max()
    problem = replace(loose, max_load=np.full(3, tightest))
    node = rng.permuted(contiguous(3, 16, 2), axis=1)
    assert problem.is_feasible(start_inside(problem, node, balanced_start(problem)))


def test_at_the_anchor_nothing_moves_that_need_not(random_problem: ProblemFactory) -> None:
    problem = random_problem((3, 8, 4), anchor=0, load=True)
    assert problem.anchor is not None
    assert np.array_equal(balanced_start(problem), problem.anchor)
    held = problem.part_loads(problem.anchor)
    limits = held.max(axis=1)
    limits[1] -= 1
    capped = replace(problem, max_load=limits, max_moves=4)
    start = balanced_start(capped)
    assert capped.is_feasible(start)
    assert np.array_equal(start[[0, 2]], problem.anchor[[0, 2]])
    with pytest.raises(InputError, match=r"max moves 0: .* \d experts have to move; allow as many"):
        balanced_start(replace(capped, max_moves=0))
    with pytest.raises(InputError, match="cannot be kept from the plan in use by single swaps"):
        balanced_start(replace(capped, max_load=np.array([1.0])))


@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(3, 6, 3), (2, 8, 4), (2, 4, 2)]))
@settings(max_examples=30, deadline=None)
def test_replicas_are_dealt_apart(
    random_problem: ProblemFactory, seed: int, shape: tuple[int, int, int]
) -> None:
    problem = random_problem(shape, seed, load=True, replicas=True)
    start = balanced_start(problem)
    assert problem.is_feasible(start)
    limits = problem.part_loads(start).max(axis=1)
    levelled = replace(problem, max_load=np.maximum(limits * 0.95, problem.load.sum(axis=1) / shape[2]))
    try:
        assert levelled.is_feasible(balanced_start(levelled))
    except InputError as error:
        least = float(str(error).split()[-3])
        worst = int(str(error).split("MoE layer ")[1].split()[0])
        assert least * levelled.load[worst].sum() / shape[2] > levelled.max_load[worst]


def test_replicas_are_swapped_for_a_cap_that_dealing_breaks() -> None:
    """Dealt out, the two heavy ones meet on part 0: 20 and 4."""
    problem = replace(
        loaded([[2, 2, 9, 1, 9, 1]], num_parts=2, max_load=13), replica_of=np.array([[0, 0, 1, 2, 3, 4]])
    )
    start = balanced_start(problem)
    assert problem.is_feasible(start)
    assert problem.part_loads(start).tolist() == [[12, 12]]
    with pytest.raises(
        InputError, match=r"max imbalance 0\.916667 cannot be kept: .* MoE layer 0 is 1\.0000"
    ):
        balanced_start(replace(problem, max_load=np.array([11.0])))
