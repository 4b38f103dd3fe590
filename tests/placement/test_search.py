import math
from collections.abc import Callable
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.baselines import contiguous, random
from exflow.placement.exact import solve_exactly
from exflow.placement.problem import PlacementProblem
from exflow.placement.search import SearchSettings, _try_swaps, pulls, search, swap_deviation, try_swaps

ProblemFactory = Callable[..., PlacementProblem]

SHORT = SearchSettings(starts=3, levels=20, passes=10)


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(3, 4, 2), (2, 6, 3), (4, 6, 2), (1, 6, 2), (3, 4, 4), (2, 4, 1)]),
)
@settings(max_examples=25, deadline=None)
def test_search_never_beats_the_optimum(
    random_problem: ProblemFactory, seed: int, shape: tuple[int, int, int]
) -> None:
    problem = random_problem(shape, seed)
    found = search(problem, seed=seed, settings=SHORT)
    assert problem.is_balanced(found)
    assert problem.cost(solve_exactly(problem)) <= problem.cost(found) <= problem.cost(contiguous(*shape))


def test_search_usually_reaches_the_optimum_of_small_problems(random_problem: ProblemFactory) -> None:
    reached = 0
    for seed in range(15):
        problem = random_problem((5, 6, 3), seed)
        found = search(problem, settings=SearchSettings(starts=3))
        reached += problem.cost(found) == problem.cost(solve_exactly(problem))
    assert reached >= 13


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
    assert costs[-1] == problem.cost(found)


@pytest.mark.parametrize("intra", [False, True])
def test_pulls_stay_true_through_swaps(random_problem: ProblemFactory, intra: bool) -> None:
    problem = random_problem((5, 12, 3), intra=intra)
    assignment = random(5, 12, 3, seed=1)
    before = assignment.copy()
    pull, held = pulls(problem, assignment), problem.part_loads(assignment)
    inter_back = np.ascontiguousarray(problem.inter.transpose(0, 2, 1))
    rng = np.random.default_rng(0)
    _try_swaps(
        problem.inter,
        inter_back,
        problem.intra,
        problem.load,
        problem.max_load,
        assignment,
        pull,
        held,
        20.0,
        50,
        rng,
    )
    assert not np.array_equal(assignment, before)
    assert problem.is_balanced(assignment)
    assert np.array_equal(pull, pulls(problem, assignment))
    assert np.array_equal(held, problem.part_loads(assignment))


def test_swaps_at_no_temperature_only_go_down(random_problem: ProblemFactory) -> None:
    problem = random_problem((5, 12, 3))
    assignment = random(5, 12, 3, seed=1)
    inter_back = np.ascontiguousarray(problem.inter.transpose(0, 2, 1))
    rng = np.random.default_rng(0)
    costs = [problem.cost(assignment)]
    for _ in range(20):
        assignment = try_swaps(problem, inter_back, assignment, 1e-9, 1, rng)
        costs.append(problem.cost(assignment))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


def test_deviation_is_that_of_true_swap_prices(random_problem: ProblemFactory) -> None:
    problem = random_problem((4, 8, 4))
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
