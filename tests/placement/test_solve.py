from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.baselines import contiguous, random
from exflow.placement.exact import solve_exactly
from exflow.placement.problem import PlacementProblem
from exflow.placement.solve import METHODS, solve
from exflow.placement.topology import Topology

ProblemFactory = Callable[..., PlacementProblem]


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


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_nodes_come_first(random_problem: ProblemFactory, seed: int) -> None:
    problem = random_problem((4, 8, 4), seed)
    solution = solve(problem, Topology(num_nodes=2, gpus_per_node=2))
    assert problem.is_balanced(solution.assignment)
    assert solution.objective == problem.cost(solution.assignment)
    assert solution.method == "exact over nodes, exact inside nodes"
    over_nodes = replace(problem, num_parts=2)
    between_nodes = over_nodes.cost(solution.assignment // 2)
    assert between_nodes == over_nodes.cost(solve_exactly(over_nodes))
    assert solution.lower_bound <= problem.cost(solve_exactly(problem)) <= solution.objective


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
    assert replace(problem, num_parts=2).cost(solution.assignment // 2) == 0


@pytest.mark.parametrize("topology", [Topology(num_nodes=4, gpus_per_node=1), Topology(gpus_per_node=4)])
def test_one_level_is_solved_at_once(random_problem: ProblemFactory, topology: Topology) -> None:
    problem = random_problem((3, 8, 4))
    solution = solve(problem, topology)
    assert solution.optimal
    assert solution.objective == problem.cost(solve_exactly(problem))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
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
