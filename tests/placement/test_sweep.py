from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.solve.baselines import random
from exflow.placement.solve.chains import swap_chain
from exflow.placement.solve.descent import align_layers, replace_layer, sweep
from exflow.placement.solve.exact import brute_force
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.solve.start import balanced_start
from exflow.placement.solve.swaps import fixed, state, try_swaps

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
    for seed in range(20):
        problem = random_problem((3, 4, 2), seed)
        optimum = problem.cost(brute_force(problem))
        found = problem.cost(sweep(problem, random(3, 4, 2, seed)))
        assert found >= optimum
        reached += found == optimum
    assert reached >= 15


def test_stop_is_obeyed_at_once(random_problem: ProblemFactory) -> None:
    start = random(4, 8, 4, seed=0)
    assert sweep(random_problem((4, 8, 4)), start, lambda: True) is start


KINDS = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(3, 6, 3), (2, 8, 4), (3, 6, 2), (2, 4, 4), (2, 4, 1)]),
        "seed": st.integers(0, 10**6),
        "load": st.booleans(),
        "balance_price": st.sampled_from([0, 5, 1000]),
        "distance": st.sampled_from([None, "nodes", "metric"]),
        "replicas": st.booleans(),
    }
)


@given(kind=KINDS, capped=st.booleans())
@settings(max_examples=80, deadline=None)
def test_no_step_makes_it_dearer_or_breaks_a_limit(
    random_problem: ProblemFactory, kind: dict[str, Any], capped: bool
) -> None:
    problem = random_problem(**kind)
    now = state(problem, balanced_start(problem))
    try_swaps(fixed(problem), now, np.inf, 3, np.random.default_rng(kind["seed"]))
    start = now.assignment
    if capped:
        problem = replace(problem, max_load=problem.part_loads(start).max(axis=1) + 3)
    results = [align_layers(problem, start), sweep(problem, start)]
    results += [replace_layer(problem, start, layer) for layer in range(problem.num_layers)]
    results += [swap_chain(problem, start, *pair) for pair in combinations(range(problem.num_parts), 2)]
    cost = problem.cost(start)
    for result in results:
        assert problem.is_feasible(result)
        assert problem.cost(result) <= cost + 1e-9 * abs(cost)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_equal_distances_of_any_length_change_nothing(random_problem: ProblemFactory, seed: int) -> None:
    """Compare where no two ways cost the same: ties may be broken differently."""
    whole = random_problem((3, 6, 3), seed)
    problem = replace(whole, inter=whole.inter + np.random.default_rng(seed).random(whole.inter.shape))
    farther = replace(problem, distance=2 * problem.distances)
    start = random(3, 6, 3, seed)
    assert farther.cost(sweep(farther, start)) == pytest.approx(2 * problem.cost(sweep(problem, start)))


@pytest.mark.parametrize("anchor", [0, 4])
def test_where_few_may_move_nothing_does(random_problem: ProblemFactory, anchor: int) -> None:
    problem = random_problem((3, 6, 3), anchor=anchor)
    start = balanced_start(problem)
    assert sweep(problem, start) is start
    assert align_layers(problem, start) is start


def test_alignment_weighs_the_links() -> None:
    """Parts 0 and 1 are near each other, and 2 and 3: what belongs together is far apart, and is renamed."""
    distance = np.where(np.arange(4)[:, None] // 2 == np.arange(4) // 2, 1.0, 8.0) * (1 - np.eye(4))
    inter = np.zeros((1, 4, 4))
    inter[0, 0, 1] = inter[0, 1, 0] = inter[0, 2, 3] = inter[0, 3, 2] = 1
    problem = PlacementProblem(inter, np.zeros((2, 4, 4)), np.ones((2, 4)), num_parts=4, distance=distance)
    far = np.array([[0, 1, 2, 3], [2, 3, 0, 1]])
    assert problem.cost(far) == 32
    assert problem.cost(align_layers(problem, far)) == 0
