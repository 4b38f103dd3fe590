from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.plan.topology import Topology
from exflow.placement.solve import anneal as search
from exflow.placement.solve.baselines import contiguous, random
from exflow.placement.solve.descent import Stop
from exflow.placement.solve.exact import brute_force, solve_exactly
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.solve.solve import METHODS, certified_bound, solve
from exflow.placement.solve.start import balanced_start

ProblemFactory = Callable[..., PlacementProblem]

TWO_NODES = Topology(num_nodes=2, gpus_per_node=2)
PRICE = st.sampled_from([0, 10])


@pytest.fixture(autouse=True, scope="module")
def few_starts() -> Iterator[None]:
    """A quarter of the search does for problems so small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_MOST_TRIALS", 150_000)
        yield


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_promises(random_problem: ProblemFactory, method: str) -> None:
    problem = random_problem((3, 6, 2))
    optimum = problem.cost(solve_exactly(problem))
    solution = solve(problem, Topology(gpus_per_node=2), method=method)
    assert problem.is_balanced(solution.assignment)
    assert solution.objective == problem.cost(solution.assignment)
    assert solution.lower_bound <= optimum <= solution.objective <= problem.cost(contiguous(3, 6, 2))
    assert solution.method == ("exact" if method == "auto" else method)
    if method in ("auto", "exact", "ilp"):
        assert solution.optimal
        assert solution.objective == solution.lower_bound == optimum


def test_auto_searches_where_exactness_is_dear(random_problem: ProblemFactory) -> None:
    problem = random_problem((4, 16, 4))
    solution = solve(problem, Topology(gpus_per_node=4), time_limit=1)
    assert solution.method == "search"
    assert not solution.optimal
    assert 0 < solution.lower_bound < solution.objective < problem.cost(contiguous(4, 16, 4))


def test_same_seed_same_solution(random_problem: ProblemFactory) -> None:
    problem = random_problem((4, 8, 4))
    topology = Topology(num_nodes=2, gpus_per_node=2)
    first, second = (solve(problem, topology, method="search", seed=7) for _ in range(2))
    assert np.array_equal(first.assignment, second.assignment)


@given(seed=st.integers(0, 10**6), linked=st.booleans())
@settings(max_examples=6, deadline=None)
def test_nodes_come_first(random_problem: ProblemFactory, seed: int, linked: bool) -> None:
    problem = random_problem((4, 8, 4), seed, distance="nodes" if linked else None)
    solution = solve(problem, TWO_NODES, method="exact")
    assert problem.is_balanced(solution.assignment)
    assert solution.objective == problem.cost(solution.assignment)
    assert solution.method == "exact over nodes, exact inside nodes"
    over_nodes = replace(problem, num_parts=2, distance=None)
    between_nodes = over_nodes.cost(solution.assignment // 2)
    assert between_nodes == over_nodes.cost(solve_exactly(over_nodes))
    assert solution.lower_bound <= solution.objective
    if not linked:
        assert solution.lower_bound <= problem.cost(solve_exactly(problem)) <= solution.objective


@given(seed=st.integers(0, 10**6), distance=st.sampled_from([None, "nodes", "metric"]), price=PRICE)
@settings(max_examples=6, deadline=None)
def test_what_the_stages_find_is_where_all_gpus_begin(
    random_problem: ProblemFactory, seed: int, distance: str | None, price: int
) -> None:
    problem = random_problem((3, 8, 4), seed, distance=distance, balance_price=price)
    solution = solve(problem, TWO_NODES, seed=seed)
    assert problem.is_feasible(solution.assignment)
    assert solution.method == "exact over nodes, exact inside nodes, search over all"
    staged = solve(problem, TWO_NODES, method="exact")
    cost = solution.objective - 1e-9 * abs(solution.objective)
    assert cost <= min(staged.objective, problem.cost(contiguous(3, 8, 4)))
    assert solution.lower_bound <= solution.objective


def test_over_links_the_optimum_is_usually_reached(random_problem: ProblemFactory) -> None:
    reached = 0
    for seed in range(6):
        problem = random_problem((2, 4, 4), seed, distance="nodes")
        solution = solve(problem, TWO_NODES)
        optimum = problem.cost(brute_force(problem))
        assert solution.lower_bound <= optimum <= solution.objective
        reached += solution.objective == optimum
    assert reached >= 5


def test_two_levels_of_affinity_are_both_found() -> None:
    rng = np.random.default_rng(0)
    rank = rng.permuted(contiguous(5, 8, 4), axis=1)  # where each expert belongs, of 2 nodes x 2 GPUs

    def affinity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        same_rank, same_node = one == other, one // 2 == other // 2
        return np.where(same_rank, 10.0, np.where(same_node, 3.0, 0.0))

    problem = PlacementProblem(
        inter=affinity(rank[:-1, :, None], rank[1:, None, :]),
        intra=np.zeros((5, 8, 8)),
        load=np.ones((5, 8)),
        num_parts=4,
    )
    solution = solve(problem, Topology(num_nodes=2, gpus_per_node=2))
    assert solution.objective == problem.cost(rank)
    assert replace(problem, num_parts=2, distance=None).cost(solution.assignment // 2) == 0


@pytest.mark.parametrize("topology", [Topology(num_nodes=4, gpus_per_node=1), Topology(gpus_per_node=4)])
def test_one_level_is_solved_at_once(random_problem: ProblemFactory, topology: Topology) -> None:
    problem = random_problem((3, 8, 4))
    solution = solve(problem, topology)
    assert solution.optimal
    assert solution.objective == problem.cost(solve_exactly(problem))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=3, deadline=None)
def test_a_planted_placement_is_recovered(seed: int) -> None:
    planted = random(6, 16, 4, seed)
    together = (planted[:-1, :, None] == planted[1:, None, :]).astype(np.float64)
    problem = PlacementProblem(together, np.zeros((6, 16, 16)), np.ones((6, 16)), num_parts=4)
    solution = solve(problem, Topology(gpus_per_node=4), time_limit=5)
    assert solution.objective == 0
    assert solution.optimal  # nothing is below zero


@pytest.mark.parametrize("method", METHODS)
def test_progress_hears_of_the_result(random_problem: ProblemFactory, method: str) -> None:
    heard: list[tuple[float, float, float]] = []
    problem = random_problem((3, 6, 2))
    solution = solve(
        problem, Topology(gpus_per_node=2), method=method, progress=lambda *state: heard.append(state)
    )
    objective, bound, seconds = heard[-1]
    assert (objective, bound) == (solution.objective, solution.lower_bound)
    assert all(bound <= objective for objective, bound, _ in heard)
    assert seconds >= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method 'magic' is unknown; choose one of auto, exact, search, sweep, ilp"),
        ({"time_limit": -1.0}, "time limit -1.0 is not a number of seconds"),
        ({"time_limit": float("nan")}, "time limit nan is not a number of seconds"),
    ],
)
def test_bad_settings_are_refused(
    random_problem: ProblemFactory, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        solve(random_problem((2, 4, 2)), Topology(gpus_per_node=2), **settings)


def test_a_topology_of_another_size_is_refused(random_problem: ProblemFactory) -> None:
    with pytest.raises(InputError, match="the problem has 2 parts, the topology 4 ranks"):
        solve(random_problem((2, 4, 2)), Topology(num_nodes=2, gpus_per_node=2))


def test_exact_where_it_does_not_apply_is_refused(random_problem: ProblemFactory) -> None:
    with pytest.raises(InputError, match="method exact: 16 experts on 4 parts"):
        solve(random_problem((2, 16, 4)), Topology(gpus_per_node=4), method="exact")


# What is known of the optimum


@given(
    shape=st.sampled_from([(2, 4, 4), (1, 6, 3), (3, 4, 2), (1, 4, 1)]),
    seed=st.integers(0, 10**6),
    distance=st.sampled_from([None, "nodes", "metric"]),
    balance_price=st.sampled_from([0, 3, 100]),
    replicas=st.booleans(),
    anchor=st.sampled_from([None, None, 4]),
)
@settings(max_examples=30, deadline=None)
def test_the_certified_bound_is_never_above_the_optimum(
    random_problem: ProblemFactory, shape: tuple[int, int, int], seed: int, **kind: Any
) -> None:
    problem = random_problem(shape, seed, **kind)
    optimum = problem.cost(brute_force(problem))
    for nodes in {1, 2, 4} & {count for count in range(1, 5) if shape[2] % count == 0}:
        topology = Topology(num_nodes=nodes, gpus_per_node=shape[2] // nodes)
        assert certified_bound(problem, topology) <= optimum + 1e-9 * abs(optimum)


def test_the_bound_counts_what_leaves_the_node_at_its_price(random_problem: ProblemFactory) -> None:
    problem = random_problem((5, 8, 8), distance="nodes")
    topology = Topology(num_nodes=2, gpus_per_node=4)
    near = certified_bound(replace(problem, distance=None), topology)
    assert near < certified_bound(problem, topology)
    doubled = replace(problem, distance=2 * problem.distances)
    assert certified_bound(doubled, topology) == pytest.approx(2 * certified_bound(problem, topology))


def test_the_bound_knows_the_heaviest_expert(random_problem: ProblemFactory) -> None:
    problem = random_problem((1, 4, 4), inter=False, intra=False, balance_price=2)
    problem = replace(problem, load=np.array([[97.0, 1, 1, 1]]))
    every = problem.cost(contiguous(1, 4, 4))  # one expert a part: all assignments alike
    assert certified_bound(problem, Topology(gpus_per_node=4)) == pytest.approx(every)


def test_names_of_gpus_do_not_matter_to_what_is_proven(random_problem: ProblemFactory) -> None:
    for seed in range(5):
        problem = random_problem((3, 6, 3), seed, balance_price=5)
        rng = np.random.default_rng(seed)
        experts = rng.permuted(np.tile(np.arange(6), (3, 1)), axis=1)
        renamed = problem.restricted(experts, rng.permutation(3))
        first, second = (solve(each, Topology(gpus_per_node=3)) for each in (problem, renamed))
        assert first.optimal and second.optimal
        assert first.objective == pytest.approx(second.objective)


# Replicas, and moving few


@given(seed=st.integers(0, 10**6), distance=st.sampled_from([None, "nodes"]), price=PRICE)
@settings(max_examples=5, deadline=None)
def test_replicas_are_searched_over_all_gpus_at_once(
    random_problem: ProblemFactory, seed: int, distance: str | None, price: int
) -> None:
    problem = random_problem((2, 4, 4), seed, distance=distance, replicas=True, balance_price=price)
    solution = solve(problem, TWO_NODES, seed=seed)
    assert ("over nodes" in solution.method) != problem.has_replicas
    assert problem.is_feasible(solution.assignment)
    optimum = problem.cost(brute_force(problem))
    assert solution.lower_bound - 1e-9 <= optimum <= solution.objective + 1e-9


@given(
    shape=st.sampled_from([(3, 6, 3), (2, 8, 4), (3, 4, 2)]),
    seed=st.integers(0, 10**6),
    most=st.integers(0, 5),
    distance=st.sampled_from([None, "nodes", "metric"]),
    method=st.sampled_from(["auto", "search", "sweep"]),
)
@settings(max_examples=10, deadline=None)
def test_no_more_experts_move_than_may(
    random_problem: ProblemFactory,
    shape: tuple[int, int, int],
    seed: int,
    most: int,
    distance: str | None,
    method: str,
) -> None:
    problem = random_problem(shape, seed, anchor=most, distance=distance, balance_price=3)
    anchor = balanced_start(problem)
    solution = solve(problem, Topology(gpus_per_node=shape[2]), method=method, time_limit=5)
    assert (solution.assignment != anchor).sum() == problem.moves(solution.assignment) <= most
    assert solution.objective <= problem.cost(anchor)
    if most < 2 or method == "sweep":
        assert np.array_equal(solution.assignment, anchor)


@given(
    shape=st.sampled_from([(3, 6, 3), (2, 8, 4), (4, 8, 2)]),
    seed=st.integers(0, 10**6),
    distance=st.sampled_from([None, "metric"]),
    price=PRICE,
    replicas=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_two_moves_are_the_best_single_swap(
    random_problem: ProblemFactory,
    shape: tuple[int, int, int],
    seed: int,
    distance: str | None,
    price: int,
    replicas: bool,
) -> None:
    problem = random_problem(shape, seed, anchor=2, distance=distance, balance_price=price, replicas=replicas)
    anchor = balanced_start(problem)
    candidates = [anchor]
    for layer in range(problem.num_layers):
        for pair in combinations(range(problem.num_experts), 2):
            swapped = anchor.copy()
            swapped[layer, pair] = anchor[layer, pair[::-1]]
            candidates.append(swapped)
    best = min(problem.cost(each) for each in candidates if problem.is_feasible(each))
    solution = solve(problem, Topology(gpus_per_node=shape[2]), seed=seed)
    assert solution.objective == pytest.approx(best)


# Refinement


def test_refinement_gets_the_best_and_its_word_counts(random_problem: ProblemFactory) -> None:
    problem = random_problem((2, 8, 4))
    got: list[np.ndarray] = []
    better = random(2, 8, 4, seed=5)

    def refine(assignment: np.ndarray, stop: Stop) -> tuple[float, np.ndarray]:
        assert not stop()
        got.append(assignment)
        return float(len(got)), better if len(got) == 1 else assignment

    for topology in (Topology(gpus_per_node=4), TWO_NODES):
        got.clear()
        solution = solve(problem, topology, method="search", refine=refine)
        assert len(got) == 2  # once each, of all GPUs, whatever the stages
        assert np.array_equal(solution.assignment, better)
        assert solution.objective == problem.cost(better)
        costs = sorted(problem.cost(each) for each in got)
        assert costs[0] < 0.9 * problem.cost(contiguous(2, 8, 4))


@pytest.mark.parametrize("method", ["exact", "sweep", "ilp"])
def test_other_methods_are_not_refined(random_problem: ProblemFactory, method: str) -> None:
    def refine(assignment: np.ndarray, stop: Stop) -> tuple[float, np.ndarray]:
        raise AssertionError

    solve(random_problem((2, 4, 2)), Topology(gpus_per_node=2), method=method, refine=refine)


def test_same_seed_same_solution_of_any_kind(random_problem: ProblemFactory) -> None:
    for kind in ({"replicas": True}, {"anchor": 4}, {"distance": "metric", "balance_price": 5}):
        problem = random_problem((2, 4, 4), 1, **kind)
        first, second = (solve(problem, TWO_NODES, method="search", seed=3) for _ in range(2))
        assert np.array_equal(first.assignment, second.assignment)
