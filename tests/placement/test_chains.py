from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.solve.baselines import contiguous, random
from exflow.placement.solve.chains import swap_chain
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.solve.start import balanced_start

ProblemFactory = Callable[..., PlacementProblem]


def swaps_of_a_layer(parts: np.ndarray, part: int, other: int) -> list[np.ndarray]:
    """The layer as it is, and after each swap of an expert of one part with one of the other."""
    results = [parts]
    for e, f in product(np.flatnonzero(parts == part), np.flatnonzero(parts == other)):
        swapped = parts.copy()
        swapped[[e, f]] = other, part
        results.append(swapped)
    return results


@given(
    shape=st.sampled_from([(1, 4, 2), (2, 4, 2), (3, 4, 2), (2, 6, 2), (2, 6, 3), (3, 3, 3)]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_the_best_of_all_chains_is_found(
    random_problem: ProblemFactory, shape: tuple[int, int, int], seed: int
) -> None:
    problem = random_problem(shape, seed)
    start = random(*shape, seed)
    choices = product(*(swaps_of_a_layer(parts, 0, 1) for parts in start))
    best = min(problem.cost(np.stack(layers)) for layers in choices)
    found = swap_chain(problem, start, 0, 1)
    assert problem.is_balanced(found)
    assert problem.cost(found) == best


@given(
    shape=st.sampled_from([(2, 4, 2), (3, 4, 2), (2, 6, 3), (2, 8, 4)]),
    seed=st.integers(0, 10**6),
    balance_price=st.sampled_from([0, 10, 200]),
    distance=st.sampled_from([None, "nodes"]),
    replicas=st.booleans(),
    slack=st.sampled_from([None, 0.0, 5.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_best_of_all_feasible_chains_is_found(
    random_problem: ProblemFactory,
    shape: tuple[int, int, int],
    seed: int,
    balance_price: int,
    distance: str | None,
    replicas: bool,
    slack: float | None,
) -> None:
    problem = random_problem(
        shape, seed, load=True, balance_price=balance_price, distance=distance, replicas=replicas
    )
    start = balanced_start(problem)
    if slack is not None:
        problem = replace(problem, max_load=problem.part_loads(start).max(axis=1) + slack)
    chains = product(*(swaps_of_a_layer(parts, 0, 1) for parts in start))
    best = min(problem.cost(chain) for chain in map(np.stack, chains) if problem.is_feasible(chain))
    found = swap_chain(problem, start, 0, 1)
    assert problem.is_feasible(found)
    assert problem.cost(found) == pytest.approx(best)


def test_between_parts_that_others_tell_apart_nothing_moves(random_problem: ProblemFactory) -> None:
    problem = random_problem((3, 8, 4), distance="nodes")
    start = random(3, 8, 4, seed=0)
    assert swap_chain(problem, start, 0, 2) is start
    assert problem.cost(swap_chain(problem, start, 0, 1)) < problem.cost(start)


def test_a_track_moves_as_a_whole_where_no_single_swap_pays() -> None:
    # Experts 0 and 2 keep to themselves through all layers, bound by 10, and lean towards 3 and 1 by 1.
    layer = np.zeros((4, 4))
    layer[[0, 2], [0, 2]] = 10
    layer[[0, 2], [3, 1]] = layer[[3, 1], [0, 2]] = 1
    layer[[1, 3], [1, 3]] = 10
    problem = PlacementProblem(np.stack([layer] * 3), np.zeros((4, 4, 4)), np.ones((4, 4)), num_parts=2)
    start = contiguous(4, 4, 2)
    assert problem.cost(start) == 12
    for layer_index in range(4):
        for parts in swaps_of_a_layer(start[layer_index], 0, 1)[1:]:
            swapped = start.copy()
            swapped[layer_index] = parts
            assert problem.cost(swapped) > 12
    assert problem.cost(swap_chain(problem, start, 0, 1)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_other_parts_and_the_given_array_stay_as_they_are(random_problem: ProblemFactory, seed: int) -> None:
    problem = random_problem((5, 12, 4), seed)
    start = random(5, 12, 4, seed)
    before = start.copy()
    found = swap_chain(problem, start, 1, 3)
    assert np.array_equal(start, before)
    bystanders = (start == 0) | (start == 2)
    assert np.array_equal(found[bystanders], start[bystanders])
    assert ((found != start).sum(axis=1) <= 2).all()
