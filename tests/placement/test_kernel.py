"""The compiled swaps: what they keep up to date, what they allow and what they price."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.solve.baselines import random
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.solve.start import balanced_start
from exflow.placement.solve.swaps import (
    State,
    apply_swap,
    balance_change,
    fixed,
    is_allowed,
    state,
    swap_price,
    try_swaps,
)

ProblemFactory = Callable[..., PlacementProblem]

KINDS = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(3, 6, 3), (2, 8, 4), (4, 6, 2), (2, 4, 4), (2, 4, 1)]),
        "seed": st.integers(0, 10**6),
        "load": st.booleans(),
        "balance_price": st.sampled_from([0, 0, 5, 1000]),
        "distance": st.sampled_from([None, "nodes", "metric"]),
        "replicas": st.booleans(),
        "anchor": st.sampled_from([None, None, 0, 2, 5]),
    }
)


def prepared(
    random_problem: ProblemFactory, kind: dict[str, Any], slack: float | None
) -> tuple[PlacementProblem, State]:
    """A problem, with the cap so much over what the start needs, and the state of the start."""
    problem = random_problem(**kind)
    start = balanced_start(problem)
    if slack is not None:
        problem = replace(problem, max_load=problem.part_loads(start).max(axis=1) + slack)
    return problem, state(problem, start)


def assert_true(problem: PlacementProblem, now: State) -> None:
    assert problem.is_feasible(now.assignment)
    for name, kept, fresh in zip(State._fields, now, state(problem, now.assignment), strict=True):
        assert np.allclose(kept, fresh), name


@given(
    kind=KINDS,
    slack=st.sampled_from([None, 0.0, 10.0]),
    temperature=st.sampled_from([1e-9, 5.0, np.inf]),
    passes=st.integers(0, 20),
)
@settings(max_examples=150, deadline=None)
def test_the_state_stays_true_through_swaps(
    random_problem: ProblemFactory, kind: dict[str, Any], slack: float | None, temperature: float, passes: int
) -> None:
    problem, now = prepared(random_problem, kind, slack)
    rng = np.random.default_rng(kind["seed"])
    for _ in range(2):
        try_swaps(fixed(problem), now, temperature, passes, rng)
        assert_true(problem, now)


@given(kind=KINDS, slack=st.sampled_from([None, 0.0, 10.0]), warm=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_swap_is_allowed_where_it_is_feasible_and_priced_at_what_it_changes(
    random_problem: ProblemFactory, kind: dict[str, Any], slack: float | None, warm: int
) -> None:
    problem, now = prepared(random_problem, kind, slack)
    prices = fixed(problem)
    try_swaps(prices, now, np.inf, warm, np.random.default_rng(kind["seed"]))
    before, cost = now.assignment.copy(), problem.cost(now.assignment)
    for layer in range(problem.num_layers):
        for e, f in np.ndindex(problem.num_experts, problem.num_experts):
            swapped = before.copy()
            swapped[layer, [e, f]] = before[layer, [f, e]]
            apart = before[layer, e] != before[layer, f]
            alike = problem.replica_ids[layer, e] == problem.replica_ids[layer, f]
            allowed = is_allowed(prices, now, layer, e, f)
            assert allowed == (apart and not alike and problem.is_feasible(swapped))
            if allowed:
                price = swap_price(prices, now, layer, e, f) + balance_change(prices, now, layer, e, f)
                assert price == pytest.approx(problem.cost(swapped) - cost, abs=1e-8 * (1 + abs(cost)))
    assert np.array_equal(now.assignment, before)  # asking changes nothing


@given(kind=KINDS)
@settings(max_examples=40, deadline=None)
def test_one_swap_and_back_leaves_the_state_true(
    random_problem: ProblemFactory, kind: dict[str, Any]
) -> None:
    problem, now = prepared(random_problem, kind, None)
    start, prices = now.assignment.copy(), fixed(problem)
    for layer, e, f in np.ndindex(problem.num_layers, problem.num_experts, problem.num_experts):
        if is_allowed(prices, now, layer, e, f):
            apply_swap(prices, now, layer, e, f)
            assert (now.assignment != start).sum() == 2
            assert_true(problem, now)
            apply_swap(prices, now, layer, e, f)
    assert np.array_equal(now.assignment, start)
    assert_true(problem, now)


def test_the_state_is_of_a_copy(random_problem: ProblemFactory) -> None:
    problem = random_problem((3, 6, 3))
    start = random(3, 6, 3, seed=0)
    before = start.copy()
    now = state(problem, start)
    try_swaps(fixed(problem), now, np.inf, 5, np.random.default_rng(0))
    assert np.array_equal(start, before)
    assert not np.array_equal(now.assignment, before)


@pytest.mark.parametrize("intra", [False, True])
def test_whole_prices_leave_no_rounding_behind(random_problem: ProblemFactory, intra: bool) -> None:
    problem = random_problem((5, 12, 3), intra=intra, load=True)
    now = state(problem, random(5, 12, 3, seed=1))
    try_swaps(fixed(problem), now, 20.0, 50, np.random.default_rng(0))
    fresh = state(problem, now.assignment)
    assert np.array_equal(now.pull, fresh.pull)
    assert np.array_equal(now.held, fresh.held)


@pytest.mark.parametrize("kind", [{}, {"balance_price": 50}, {"distance": "metric"}, {"replicas": True}])
def test_swaps_at_no_temperature_only_go_down(random_problem: ProblemFactory, kind: dict[str, Any]) -> None:
    problem = random_problem((5, 12, 3), **kind)
    now, rng = state(problem, balanced_start(problem)), np.random.default_rng(0)
    costs = [problem.cost(now.assignment)]
    for _ in range(20):
        try_swaps(fixed(problem), now, 1e-9, 1, rng)
        costs.append(problem.cost(now.assignment))
    assert (np.diff(costs) <= 1e-9).all()
    assert costs[-1] < costs[0]


def test_the_limit_on_moves_is_reached_and_kept(random_problem: ProblemFactory) -> None:
    for most in (0, 1, 2, 3, 6):
        problem = random_problem((4, 8, 4), anchor=most)
        assert problem.anchor is not None
        now, rng, seen = state(problem, problem.anchor), np.random.default_rng(0), set()
        for _ in range(50):
            try_swaps(fixed(problem), now, np.inf, 1, rng)
            seen.add(int(now.moved[0]))
            assert now.moved[0] == (now.assignment != problem.anchor).sum() <= most
        assert max(seen) == (most if most != 1 else 0)  # one alone cannot move
