from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.solve.baselines import contiguous, random
from exflow.placement.solve.problem import NORM, PlacementProblem, soft_maximum

ProblemFactory = Callable[..., PlacementProblem]

# Two layers, four experts, two parts: a price of 5 from expert 0 to expert 3, and of 2 between 0 and 1.
TWO_LAYERS = PlacementProblem(
    inter=np.array([[[0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]], dtype=np.float64),
    intra=np.stack([2 * np.eye(4)[[1, 0, 2, 3]] * (np.arange(4) < 2), np.zeros((4, 4))]),
    load=np.ones((2, 4)),
    num_parts=2,
)


@pytest.mark.parametrize(
    ("assignment", "cost"),
    [
        ([[0, 0, 1, 1], [1, 1, 0, 0]], 0),
        ([[0, 0, 1, 1], [0, 0, 1, 1]], 5),
        ([[0, 1, 0, 1], [1, 1, 0, 0]], 2),
        ([[0, 1, 0, 1], [0, 0, 1, 1]], 7),
    ],
)
def test_cost_is_the_prices_of_what_is_apart(assignment: list[list[int]], cost: float) -> None:
    assert TWO_LAYERS.cost(np.array(assignment)) == cost


def test_balanced_means_equal_shares_in_every_layer() -> None:
    assert TWO_LAYERS.is_balanced(np.array([[0, 1, 1, 0], [1, 1, 0, 0]]))
    assert not TWO_LAYERS.is_balanced(np.array([[0, 1, 1, 1], [1, 0, 0, 0]]))  # only over both layers
    assert not TWO_LAYERS.is_balanced(np.array([[0, 1, 1, 0]]))
    assert not TWO_LAYERS.is_balanced(np.array([[0, 0, 2, 2], [0, 0, 1, 1]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_parts": 3}, r"4 experts cannot be spread evenly over 3 parts; choose a divisor of 4"),
        ({"num_parts": 0}, r"4 experts cannot be spread evenly over 0 parts"),
        ({"inter": np.zeros((2, 4, 4))}, r"inter: shape \(2, 4, 4\), expected \(1, 4, 4\)"),
        ({"inter": np.zeros((1, 4, 4), dtype=np.int64)}, r"inter: dtype int64, expected float64"),
        ({"inter": np.full((1, 4, 4), np.nan)}, r"inter: .*non-finite"),
        ({"inter": np.full((1, 4, 4), -1.0)}, r"inter: .*negative"),
        ({"intra": np.ones((2, 4, 4))}, r"intra: the diagonal is not zero"),
        ({"intra": np.triu(np.ones((2, 4, 4)), 1)}, r"intra: not symmetric"),
        ({"load": np.ones(4)}, r"load: shape \(4,\); give \[layers, experts\]"),
        ({"load": np.ones((0, 4))}, r"load: shape \(0, 4\)"),
        ({"balance_price": np.ones(3)}, r"balance_price: shape \(3,\), expected \(2,\)"),
        ({"balance_price": np.array([-1.0])}, r"balance_price: holds negative values or NaN"),
        ({"distance": np.zeros((4, 4))}, r"distance: shape \(4, 4\), expected \(2, 2\)"),
        ({"distance": np.array([[0, np.inf], [np.inf, 0]])}, r"distance: .*non-finite"),
    ],
)
def test_bad_arrays_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        replace(TWO_LAYERS, **change)
    assert "\n" not in str(error.value)


@given(seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_cost_splits_into_between_and_inside_nodes(random_problem: ProblemFactory, seed: int) -> None:
    problem = random_problem((3, 8, 4), seed)
    ranks = random(3, 8, 4, seed)
    nodes = ranks // 2
    inside = 0.0
    for node in range(2):
        experts = np.stack([np.flatnonzero(row == node) for row in nodes])
        restricted = problem.restricted(experts, np.arange(2 * node, 2 * node + 2))
        inside += restricted.cost(np.take_along_axis(ranks, experts, axis=1) % 2)
    assert problem.cost(ranks) == replace(problem, num_parts=2, distance=None).cost(nodes) + inside


@given(
    seed=st.integers(0, 10**6),
    balance_price=st.sampled_from([0, 7]),
    distance=st.sampled_from([None, "nodes", "metric"]),
    replicas=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_cost_is_its_definition(
    random_problem: ProblemFactory, seed: int, balance_price: int, distance: str | None, replicas: bool
) -> None:
    problem = random_problem(
        (3, 6, 3), seed, balance_price=balance_price, distance=distance, replicas=replicas
    )
    parts = random(3, 6, 3, seed)
    cost = problem.constant
    for layer, row in enumerate(parts):
        for e, f in np.ndindex(6, 6):
            cost += problem.intra[layer, e, f] * problem.distances[row[e], row[f]] / 2
            if layer < 2:
                cost += problem.inter[layer, e, f] * problem.distances[row[e], parts[layer + 1, f]]
        held = [problem.load[layer, row == part].sum() for part in range(3)]
        least = 3 ** (1 / NORM) * problem.load[layer].mean() * 2
        cost += balance_price * (sum(load**NORM for load in held) ** (1 / NORM) - least)
    assert problem.cost(parts) == pytest.approx(cost)


def test_imbalance_costs_nothing_at_level_loads_and_little_near_them() -> None:
    problem = replace(TWO_LAYERS, balance_price=np.array([1.0]), load=np.full((2, 4), 25.0))
    level = np.full((2, 2), 50.0)
    near, far = level.copy(), level.copy()
    near[0], far[0] = [51, 49], [90, 10]
    assert problem.imbalance_cost(level) == 0
    assert 0 < problem.imbalance_cost(near) < 0.2  # the maximum is 1 over the mean
    assert 35 < problem.imbalance_cost(far) < 40  # and here 40


@given(loads=st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_the_soft_maximum_is_near_the_maximum(loads: list[int]) -> None:
    soft = float(soft_maximum(np.array(loads, dtype=np.float64)))
    assert max(loads) * (1 - 1e-12) <= soft <= max(loads) * len(loads) ** (1 / NORM) * (1 + 1e-12)


@given(seed=st.integers(0, 10**6), distance=st.sampled_from([None, "nodes", "metric"]))
@settings(max_examples=25, deadline=None)
def test_restricting_to_everything_renames(
    random_problem: ProblemFactory, seed: int, distance: str | None
) -> None:
    problem = random_problem((3, 6, 3), seed, balance_price=3, distance=distance)
    rng = np.random.default_rng(seed)
    experts, parts = rng.permuted(np.tile(np.arange(6), (3, 1)), axis=1), rng.permutation(3)
    old = random(3, 6, 3, seed)
    new_name = np.empty(3, dtype=np.int64)
    new_name[parts] = np.arange(3)
    renamed = new_name[np.take_along_axis(old, experts, axis=1)]
    assert problem.restricted(experts, parts).cost(renamed) == pytest.approx(problem.cost(old))


def test_replicas_of_one_expert_share_no_part(random_problem: ProblemFactory) -> None:
    replica_of = np.array([[0, 0, 1, 2], [0, 1, 1, 2]])
    problem = replace(random_problem((2, 4, 2)), replica_of=replica_of)
    assert problem.has_replicas
    assert problem.is_feasible(np.array([[0, 1, 0, 1], [0, 0, 1, 1]]))
    assert not problem.is_feasible(np.array([[0, 0, 1, 1], [0, 0, 1, 1]]))
    assert not problem.is_feasible(np.array([[0, 1, 0, 1], [0, 1, 1, 0]]))
    assert not random_problem((2, 4, 2)).has_replicas


def test_only_so_many_may_have_moved(random_problem: ProblemFactory) -> None:
    anchor = contiguous(2, 4, 2)
    problem = replace(random_problem((2, 4, 2)), anchor=anchor, max_moves=2)
    swapped = np.array([[0, 1, 0, 1], [0, 0, 1, 1]])
    assert problem.moves(anchor) == 0 and problem.moves(swapped) == 2
    assert problem.is_feasible(swapped)
    assert not problem.is_feasible(swapped[:, ::-1])
    assert not replace(problem, max_moves=1).is_feasible(swapped)
    assert random_problem((2, 4, 2)).moves(swapped) == 0


@pytest.mark.parametrize(("kind", "uniform"), [(None, True), ("nodes", False), ("metric", False)])
def test_uniform_means_that_names_do_not_matter(
    random_problem: ProblemFactory, kind: str | None, uniform: bool
) -> None:
    assert random_problem((2, 4, 4), distance=kind).is_uniform == uniform


@pytest.mark.parametrize("change", [{"replicas": True}, {"anchor": 2}, {"distance": "metric"}, {}])
def test_the_factory_makes_what_it_says(random_problem: ProblemFactory, change: dict[str, Any]) -> None:
    problem = random_problem((4, 8, 4), 3, **change)
    assert problem.has_replicas == ("replicas" in change)
    assert (problem.anchor is not None) == ("anchor" in change)
    assert problem.is_uniform == ("distance" not in change)
    assert np.array_equal(problem.distances, problem.distances.T)
