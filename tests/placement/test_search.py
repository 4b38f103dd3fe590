import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.solve.anneal import SearchSettings, search, search_all, settings_for, swap_deviation
from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.exact import brute_force, solve_exactly
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.solve.start import balanced_start

ProblemFactory = Callable[..., PlacementProblem]

SHORT = SearchSettings(starts=3, levels=20, passes=10)


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(3, 4, 2), (2, 6, 3), (4, 6, 2), (1, 6, 2), (3, 4, 4), (2, 4, 1)]),
)
@settings(max_examples=15, deadline=None)
def test_search_never_beats_the_optimum(
    random_problem: ProblemFactory, seed: int, shape: tuple[int, int, int]
) -> None:
    problem = random_problem(shape, seed)
    found = search(problem, seed=seed, settings=SHORT)
    assert problem.is_balanced(found)
    assert problem.cost(solve_exactly(problem)) <= problem.cost(found) <= problem.cost(contiguous(*shape))


def test_search_usually_reaches_the_optimum_of_small_problems(random_problem: ProblemFactory) -> None:
    reached = 0
    for seed in range(8):
        problem = random_problem((5, 6, 3), seed)
        found = search(problem, settings=SearchSettings(starts=3))
        reached += problem.cost(found) == problem.cost(solve_exactly(problem))
    assert reached >= 7


def test_same_seed_same_assignment(random_problem: ProblemFactory) -> None:
    problem = random_problem((6, 16, 4))
    first, second = (search(problem, seed=3, settings=SHORT) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("time_limit", [0, 0.05])
def test_time_limit_ends_the_search_with_something_good(
    random_problem: ProblemFactory, time_limit: float
) -> None:
    problem = random_problem((20, 32, 8))
    endless = SearchSettings(starts=2, levels=10**6, passes=10)
    began = perf_counter()
    found = search(problem, settings=endless, time_limit=time_limit)
    assert perf_counter() - began < 10  # most of it compilation, where nothing is cached
    assert problem.is_balanced(found)
    assert problem.cost(found) <= problem.cost(contiguous(*problem.shape))


def test_interrupt_returns_the_best_so_far(random_problem: ProblemFactory) -> None:
    problem = random_problem((20, 32, 8))

    def interrupt(cost: float) -> None:
        raise KeyboardInterrupt

    endless = SearchSettings(starts=2, levels=10**6, passes=10)
    found = search(problem, settings=endless, report=interrupt)
    assert problem.is_balanced(found)
    assert problem.cost(found) < problem.cost(contiguous(*problem.shape))


def test_report_gets_falling_costs(random_problem: ProblemFactory) -> None:
    problem = random_problem((20, 32, 8))
    costs: list[float] = []
    found = search(problem, settings=SearchSettings(starts=2), report=costs.append)
    assert costs == sorted(costs, reverse=True)
    assert problem.cost(found) <= costs[-1] < problem.cost(contiguous(*problem.shape))


KINDS = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(2, 4, 2), (3, 4, 2), (1, 6, 3), (2, 4, 4)]),
        "seed": st.integers(0, 10**6),
        "balance_price": st.sampled_from([0, 10]),
        "distance": st.sampled_from([None, "metric"]),
        "replicas": st.booleans(),
        "anchor": st.sampled_from([None, 2, 4]),
    }
)


@given(kind=KINDS)
@settings(max_examples=15, deadline=None)
def test_search_keeps_every_limit_and_never_beats_brute_force(
    random_problem: ProblemFactory, kind: dict[str, Any]
) -> None:
    problem = random_problem(**kind)
    start = balanced_start(problem)
    found = search_all(problem, start, seed=kind["seed"], settings=SHORT)
    costs = [problem.cost(assignment) for assignment in found]
    assert all(map(problem.is_feasible, found))
    assert (np.diff(costs) >= -1e-9).all()
    assert costs[0] <= problem.cost(start) + 1e-9
    assert costs[0] >= problem.cost(brute_force(problem)) - 1e-9


@pytest.mark.parametrize(
    "kind", [{"distance": "metric"}, {"distance": "nodes", "balance_price": 10}, {"replicas": True}]
)
def test_search_usually_reaches_the_optimum_of_any_kind(
    random_problem: ProblemFactory, kind: dict[str, Any]
) -> None:
    reached = 0
    for seed in range(6):
        problem = random_problem((2, 4, 4), seed, **kind)
        best = search(problem, settings=SearchSettings(starts=3, levels=50))
        reached += problem.cost(best) <= problem.cost(brute_force(problem)) + 1e-9
    assert reached >= 5


def test_huge_problems_get_fewer_starts_then_fewer_passes() -> None:
    tiny, huge = (
        PlacementProblem(
            np.zeros((layers - 1, experts, experts)),
            np.zeros((layers, experts, experts)),
            np.ones((layers, experts)),
            num_parts=4,
        )
        for layers, experts in ((2, 8), (6000, 8))
    )
    usual = SearchSettings()
    assert settings_for(tiny) == usual
    assert (settings_for(huge).starts, settings_for(huge).levels) == (2, usual.levels)
    assert 3 <= settings_for(huge).passes < usual.passes


@pytest.mark.parametrize("distance", [None, "nodes", "metric"])
def test_deviation_is_that_of_true_swap_prices(random_problem: ProblemFactory, distance: str | None) -> None:
    problem = random_problem((4, 8, 4), distance=distance)
    rng = np.random.default_rng(5)
    assignment = np.random.default_rng(5).permuted(contiguous(4, 8, 4), axis=1)
    prices = []
    for layer, e, f in np.ndindex(4, 8, 8):
        if assignment[layer, e] != assignment[layer, f]:
            swapped = assignment.copy()
            swapped[layer, [e, f]] = assignment[layer, [f, e]]
            prices.append(problem.cost(swapped) - problem.cost(assignment))
    assert swap_deviation(problem, rng) == pytest.approx(np.std(prices), rel=0.1)


def test_problems_without_a_choice(random_problem: ProblemFactory) -> None:
    one_part = random_problem((3, 4, 1))
    assert np.array_equal(search(one_part, settings=SHORT), contiguous(3, 4, 1))
    no_prices = random_problem((3, 4, 2), inter=False, intra=False)
    assert no_prices.is_balanced(search(no_prices, settings=SHORT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": 0}, "search: starts is 0; it must be at least 1"),
        ({"levels": 0}, "search: levels is 0"),
        ({"passes": -1}, "search: passes is -1"),
        ({"cold": 0.0}, "choose 0 < cold <= hot"),
        ({"cold": 2.0}, "search: cold is 2.0 and hot 1.0"),
        ({"hot": math.inf}, "hot inf"),
        ({"hot": math.nan}, "hot nan"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SearchSettings(**change)
