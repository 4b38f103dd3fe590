import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh

from exflow.placement.solve import spectral
from exflow.placement.solve.bounds import lower_bound
from exflow.placement.solve.exact import brute_force, chain_of_matchings, solve_exactly
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.solve.spectral import certified, most_kept_together, windows

ProblemFactory = Callable[..., PlacementProblem]
SMALL = [(1, 4, 2), (1, 6, 3), (2, 4, 2), (3, 4, 2), (2, 4, 4), (1, 4, 4), (2, 6, 2), (2, 4, 1), (3, 1, 1)]


def total(problem: PlacementProblem) -> float:
    return float(problem.inter.sum() + problem.intra.sum() / 2)


def planted(seed: int = 0) -> PlacementProblem:
    """12 experts a layer in two groups that like each other a little better, under much noise."""
    rng = np.random.default_rng(seed)
    group = np.stack([rng.permutation(12) % 2 for _ in range(6)])
    intra = np.triu(rng.random((6, 12, 12)) + 0.3 * (group[:, :, None] == group[:, None, :]), 1)
    inter = rng.random((5, 12, 12)) + 0.3 * (group[:-1, :, None] == group[1:, None, :])
    return PlacementProblem(inter, intra + intra.transpose(0, 2, 1), np.ones((6, 12)), num_parts=2)


@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SMALL), inter=st.booleans(), intra=st.booleans())
@settings(max_examples=50, deadline=None)
def test_no_assignment_keeps_more(
    random_problem: ProblemFactory,
    seed: int,
    shape: tuple[int, int, int],
    inter: bool,
    intra: bool,
) -> None:
    problem = random_problem(shape, seed, inter=inter, intra=intra)
    kept = total(problem) - problem.cost(brute_force(problem))
    assert kept <= most_kept_together(problem) <= total(problem) * 1.5 + 1e-9


@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(4, 8, 2), (3, 8, 4), (5, 6, 3), (6, 6, 6)]))
@settings(max_examples=12, deadline=None)
def test_no_assignment_of_more_layers_keeps_more(
    random_problem: ProblemFactory, seed: int, shape: tuple[int, int, int]
) -> None:
    problem = random_problem(shape, seed)
    kept = total(problem) - problem.cost(solve_exactly(problem))
    assert kept <= most_kept_together(problem)


@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SMALL[:7]), unit=st.sampled_from([0.01, 1.0, 10.0]))
@settings(max_examples=30, deadline=None)
def test_any_multipliers_prove_a_bound(
    random_problem: ProblemFactory, seed: int, shape: tuple[int, int, int], unit: float
) -> None:
    problem = random_problem(shape, seed)
    kept = total(problem) - problem.cost(brute_force(problem))
    prices = windows(problem)
    differ = np.random.default_rng(seed).standard_normal(prices.shape).astype(np.float32)
    with ThreadPoolExecutor(2) as pool:
        assert kept <= certified(prices, unit, differ, problem.num_parts, pool)


def test_any_number_of_steps_proves_a_bound(random_problem: ProblemFactory) -> None:
    problem = random_problem((4, 8, 2))
    kept = total(problem) - problem.cost(solve_exactly(problem))
    at_once = most_kept_together(problem, stop=lambda: True)
    assert kept <= most_kept_together(problem) < at_once < np.inf


def test_lapack_may_find_fewer_eigenvalues(
    random_problem: ProblemFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK seldom does so: where the eigenvalues at the edge of the range are nearly equal."""
    numbers = itertools.count()

    def fewer(matrix: Any, subset_by_index: list[int]) -> Any:
        values, vectors = eigh(matrix, subset_by_index=subset_by_index)
        lost = next(numbers) % 3
        return values[lost:], vectors[:, lost:]

    problem = random_problem((4, 8, 2))
    kept = total(problem) - problem.cost(solve_exactly(problem))
    monkeypatch.setattr(spectral, "eigh", fewer)
    assert kept <= most_kept_together(problem) < total(problem)


def test_it_ends_where_it_is_good_enough(random_problem: ProblemFactory) -> None:
    problem = random_problem((4, 8, 2))
    best = most_kept_together(problem)
    assert best < most_kept_together(problem, enough=total(problem)) <= total(problem)


def test_groups_that_fit_the_parts_are_seen_to_be_optimal() -> None:
    # Everyone likes all of its own group: of each layer half the experts, for each of the 2 parts.
    group = np.arange(8) % 2
    alike = (group[:, None] == group).astype(np.float64)
    inter, intra = np.stack([alike] * 3), np.stack([alike - np.eye(8)] * 4)
    problem = PlacementProblem(inter, intra, np.ones((4, 8)), num_parts=2)
    assert most_kept_together(problem) == pytest.approx(total(problem), rel=1e-3)


def test_groups_are_seen_through_noise() -> None:
    problem = planted()
    optimum = problem.cost(solve_exactly(problem))
    degrees, spectrum = lower_bound(problem), total(problem) - most_kept_together(problem)
    assert degrees < 0.9 * optimum < 0.999 * optimum < spectrum <= optimum


def test_names_and_order_do_not_matter() -> None:
    problem = planted(1)
    bound = most_kept_together(problem)
    name = np.stack([np.random.default_rng(layer).permutation(12) for layer in range(6)])
    renamed = problem.restricted(name, np.arange(2))
    assert most_kept_together(renamed) == pytest.approx(bound, rel=1e-4)
    backwards = replace(problem, inter=problem.inter[::-1].transpose(0, 2, 1), intra=problem.intra[::-1])
    assert most_kept_together(backwards) == pytest.approx(bound, rel=1e-4)


def test_one_expert_a_part_keeps_a_matching(random_problem: ProblemFactory) -> None:
    problem = random_problem((4, 8, 8), intra=False)
    kept = total(problem) - problem.cost(chain_of_matchings(problem))
    assert kept <= most_kept_together(problem) <= 1.05 * kept


def test_the_unit_of_the_prices_does_not_matter() -> None:
    problem = planted(2)
    bound = most_kept_together(problem)
    for unit in (1e-12, 1e12):
        other = replace(problem, inter=unit * problem.inter, intra=unit * problem.intra)
        assert most_kept_together(other) == pytest.approx(unit * bound, rel=1e-4)


def test_nothing_is_said_of_what_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_USUAL_WORK", "_MOST_WORK"):
        monkeypatch.setattr(f"exflow.placement.solve.spectral.{limit}", 1000)
    assert most_kept_together(planted()) == np.inf


def test_one_part_keeps_all(random_problem: ProblemFactory) -> None:
    problem = random_problem((3, 4, 1))
    assert most_kept_together(problem) == total(problem)
