from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.bounds import lower_bound, most_kept
from exflow.placement.solve.exact import brute_force, chain_of_matchings, viterbi
from exflow.placement.solve.problem import PlacementProblem

ProblemFactory = Callable[..., PlacementProblem]


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 4, 2), (2, 4, 2), (3, 4, 2), (2, 4, 4), (2, 6, 2), (1, 6, 3), (2, 4, 1)]),
    intra=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_bound_is_never_above_the_optimum(
    random_problem: ProblemFactory, seed: int, shape: tuple[int, int, int], intra: bool
) -> None:
    problem = random_problem(shape, seed, intra=intra)
    best = brute_force(problem)
    assert 0 <= lower_bound(problem) <= lower_bound(problem, best) <= problem.cost(best)


@given(
    seed=st.integers(0, 10**6), distance=st.sampled_from([None, "metric"]), balance_price=st.integers(0, 1)
)
@settings(max_examples=8, deadline=None)
def test_bound_is_about_separation_alone_whatever_is_known(
    random_problem: ProblemFactory, seed: int, distance: str | None, balance_price: int
) -> None:
    problem = random_problem((3, 8, 2), seed, distance=distance, balance_price=balance_price)
    plain = replace(problem, distance=None, balance_price=np.zeros(1))
    best = viterbi(plain)
    for known in (best, contiguous(3, 8, 2)):
        assert lower_bound(plain) <= lower_bound(problem, known) <= plain.cost(best)


def test_a_known_assignment_is_proved_optimal() -> None:
    # Two groups that like each other a little better, under much noise.
    rng = np.random.default_rng(0)
    alike = np.arange(10)[:, None] % 2 == np.arange(10) % 2
    inter = 0.3 * alike + rng.random((4, 10, 10))
    intra = np.triu(0.3 * alike + rng.random((5, 10, 10)), 1)
    problem = PlacementProblem(inter, intra + intra.transpose(0, 2, 1), np.ones((5, 10)), num_parts=2)
    known = viterbi(problem)
    cost = problem.cost(known)
    assert lower_bound(problem) < 0.9 * cost < 0.99 * cost < lower_bound(problem, known) <= cost


def test_bound_is_near_where_layers_need_not_agree(random_problem: ProblemFactory) -> None:
    problem = random_problem((5, 8, 8))
    optimum = problem.cost(chain_of_matchings(problem))
    assert 0.98 * optimum <= lower_bound(problem) <= optimum


def test_bound_holds_each_experts_best_partners_against_the_rest() -> None:
    # Expert 0 goes to 0, 1 and 2 alike, and can keep two of them; the others go nowhere.
    inter = np.zeros((1, 4, 4))
    inter[0, 0, :3] = 1
    problem = PlacementProblem(inter, np.zeros((2, 4, 4)), np.ones((2, 4)), num_parts=2)
    assert lower_bound(problem) == pytest.approx(1)


def test_bound_holds_each_experts_best_mates_against_the_rest() -> None:
    # All experts of the layer are co-selected alike; of its three mates an expert can keep one.
    intra = 1 - np.eye(4)[None]
    problem = PlacementProblem(np.zeros((0, 4, 4)), intra, np.ones((1, 4)), num_parts=2)
    assert lower_bound(problem) == pytest.approx(4)


def test_columns_count_as_well_as_rows() -> None:
    # All go to expert 0, which has room for two: rows alone would keep all four.
    prices = np.zeros((1, 4, 4))
    prices[0, :, 0] = 1
    assert most_kept(prices, degree=2) == pytest.approx(2, rel=0.05)


@given(seed=st.integers(0, 10**6), degree=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_most_kept_lies_between_a_matching_and_the_rows_best(seed: int, degree: int) -> None:
    prices = np.random.default_rng(seed).random((3, 6, 6))
    circulant = (np.arange(6) - np.arange(6)[:, None]) % 6 < degree  # `degree` a row and a column
    rows_best = np.sort(prices, axis=2)[:, :, 6 - degree :].sum()
    assert prices[:, circulant].sum() <= most_kept(prices, degree) + 1e-9 <= rows_best + 2e-9


def test_no_prices_no_bound(random_problem: ProblemFactory) -> None:
    assert lower_bound(random_problem((3, 4, 2), inter=False, intra=False)) == 0
