from collections.abc import Callable
from itertools import permutations, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.baselines import random
from exflow.placement.exact import brute_force
from exflow.placement.problem import PlacementProblem
from exflow.placement.sweep import align_layers, replace_layer, sweep

ProblemFactory = Callable[..., PlacementProblem]


@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(3, 6, 3), (2, 6, 6), (4, 4, 2), (1, 4, 2)]))
@settings(max_examples=20, deadline=None)
def test_alignment_is_the_best_of_all_renamings(
    random_problem: ProblemFactory, seed: int, shape: tuple[int, int, int]
) -> None:
    problem = random_problem(shape, seed)
    start = random(*shape, seed)
    names = [np.array(name) for name in permutations(range(shape[2]))]
    best = min(
        problem.cost(np.stack([name[row] for name, row in zip(renaming, start, strict=True)]))
        for renaming in product(names[:1], *[names] * (shape[0] - 1))  # only relative names matter
    )
    assert problem.cost(align_layers(problem, start)) == best


@given(seed=st.integers(0, 10**6), layer=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_one_layer_is_replaced_exactly_without_intra_prices(
    random_problem: ProblemFactory, seed: int, layer: int
) -> None:
    problem = random_problem((3, 6, 3), seed, intra=False)
    start = random(3, 6, 3, seed)
    candidates = []
    for parts in set(permutations([0, 0, 1, 1, 2, 2])):
        candidate = start.copy()
        candidate[layer] = parts
        candidates.append(problem.cost(candidate))
    assert problem.cost(replace_layer(problem, start, layer)) == min(candidates)


@given(seed=st.integers(0, 10**6), layer=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_one_layer_is_never_replaced_for_the_worse(
    random_problem: ProblemFactory, seed: int, layer: int
) -> None:
    problem = random_problem((3, 8, 4), seed)
    start = random(3, 8, 4, seed)
    found = replace_layer(problem, start, layer)
    assert problem.is_balanced(found)
    assert problem.cost(found) <= problem.cost(start)
    assert np.array_equal(np.delete(found, layer, axis=0), np.delete(start, layer, axis=0))


@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(4, 8, 4), (5, 6, 2), (1, 6, 3), (3, 4, 1)]))
@settings(max_examples=20, deadline=None)
def test_a_sweep_goes_down_and_ends_where_nothing_helps(
    random_problem: ProblemFactory, seed: int, shape: tuple[int, int, int]
) -> None:
    problem = random_problem(shape, seed)
    start = random(*shape, seed)
    found = sweep(problem, start)
    assert problem.is_balanced(found)
    assert problem.cost(found) <= problem.cost(start)
    assert problem.cost(sweep(problem, found)) == problem.cost(found)


def test_a_sweep_usually_reaches_the_optimum_of_tiny_problems(random_problem: ProblemFactory) -> None:
    reached = 0
    for seed in range(40):
        problem = random_problem((3, 4, 2), seed)
        optimum = problem.cost(brute_force(problem))
        found = problem.cost(sweep(problem, random(3, 4, 2, seed)))
        assert found >= optimum
        reached += found == optimum
    assert reached >= 30


def test_stop_is_obeyed_at_once(random_problem: ProblemFactory) -> None:
    start = random(4, 8, 4, seed=0)
    assert sweep(random_problem((4, 8, 4)), start, lambda: True) is start
