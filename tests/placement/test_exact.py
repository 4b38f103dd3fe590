from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.counts.affinity import count_affinity
from exflow.placement.plan.topology import Topology
from exflow.placement.solve import exact
from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.exact import (
    brute_force,
    chain_of_matchings,
    count_transitions,
    is_exactly_solvable,
    solve_exactly,
    viterbi,
)
from exflow.placement.solve.objective import Objective, make_problem
from exflow.placement.solve.problem import PlacementProblem
from exflow.profiling.trace import RoutingTrace

ProblemFactory = Callable[..., PlacementProblem]

TINY = [(1, 4, 2), (2, 4, 2), (3, 4, 2), (2, 4, 4), (3, 3, 3), (2, 6, 2), (1, 6, 3), (2, 4, 1), (1, 1, 1)]
MIXTRAL = Path(__file__).resolve().parents[3] / "shared" / "traces" / "mixtral8x7b_math.npz"


@given(
    shape=st.sampled_from(TINY), seed=st.integers(0, 10**6), balance_price=st.sampled_from([0, 1, 20, 1000])
)
@settings(max_examples=40, deadline=None)
def test_exact_methods_equal_brute_force(
    random_problem: ProblemFactory, shape: tuple[int, int, int], seed: int, balance_price: int
) -> None:
    problem = random_problem(shape, seed, balance_price=balance_price)
    optimum = problem.cost(brute_force(problem))
    for method in (viterbi, solve_exactly):
        assignment = method(problem)
        assert problem.is_balanced(assignment)
        cost = problem.cost(assignment)
        assert cost == pytest.approx(optimum) if balance_price else cost == optimum


@pytest.mark.parametrize("change", [{"distance": "metric"}, {"replicas": True}, {"anchor": 2}])
def test_what_it_does_not_know_is_refused(random_problem: ProblemFactory, change: dict[str, object]) -> None:
    for shape in ((2, 4, 2), (2, 4, 4)):
        problem = random_problem(shape, 1, **change)
        assert is_exactly_solvable(problem) == (problem.is_uniform and "distance" in change)
        if not is_exactly_solvable(problem):
            message = "method exact: does not know unequal distances, replicas, or a limit on moves"
            with pytest.raises(InputError, match=message):
                solve_exactly(problem)
    assert is_exactly_solvable(random_problem((2, 4, 2), 1, balance_price=5))


@pytest.mark.parametrize("price", [0, 10**5])
def test_a_high_price_of_imbalance_levels_the_loads(random_problem: ProblemFactory, price: int) -> None:
    """The cost of the optimum is then next to that of the most level assignment."""
    problem = random_problem((3, 6, 2), 1, load=True, balance_price=price)
    level_only = replace(problem, inter=0 * problem.inter, intra=0 * problem.intra)
    over = level_only.cost(solve_exactly(problem)) - level_only.cost(solve_exactly(level_only))
    assert over == pytest.approx(0, abs=1e-6 * max(price, 1))
    if price:
        free = replace(problem, balance_price=np.zeros(3))
        assert free.cost(solve_exactly(problem)) > free.cost(solve_exactly(free))


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_matchings_and_viterbi_agree_on_one_expert_a_part(
    random_problem: ProblemFactory, seed: int, layers: int
) -> None:
    problem = random_problem((layers, 5, 5), seed)
    assert problem.cost(chain_of_matchings(problem)) == problem.cost(viterbi(problem))


@given(seed=st.integers(0, 10**6), parts=st.sampled_from([2, 3, 6]), balance_price=st.sampled_from([0, 10]))
@settings(max_examples=20, deadline=None)
def test_optimum_ignores_names_of_experts_and_direction(
    random_problem: ProblemFactory, seed: int, parts: int, balance_price: int
) -> None:
    problem = random_problem((5, 6, parts), seed, balance_price=balance_price)
    optimum = problem.cost(solve_exactly(problem))
    rng = np.random.default_rng(seed)
    renamed = problem.restricted(rng.permuted(np.tile(np.arange(6), (5, 1)), axis=1), np.arange(parts))
    backwards = reversed_layers(problem)
    assert renamed.cost(solve_exactly(renamed)) == pytest.approx(optimum)
    assert backwards.cost(solve_exactly(backwards)) == pytest.approx(optimum)


@given(
    seed=st.integers(0, 10**6),
    distance=st.sampled_from(["nodes", "metric"]),
    replicas=st.booleans(),
    balance_price=st.sampled_from([0, 10]),
)
@settings(max_examples=6, deadline=None)
def test_least_cost_ignores_names_of_gpus_too(
    random_problem: ProblemFactory, seed: int, distance: str, replicas: bool, balance_price: int
) -> None:
    problem = random_problem(
        (2, 4, 4), seed, distance=distance, replicas=replicas, balance_price=balance_price
    )
    optimum = problem.cost(brute_force(problem))
    rng = np.random.default_rng(seed)
    experts = rng.permuted(np.tile(np.arange(4), (2, 1)), axis=1)
    renamed = replace(problem.restricted(experts, rng.permutation(4)), constant=problem.constant)
    for other in (renamed, reversed_layers(problem)):
        assert other.cost(brute_force(other)) == pytest.approx(optimum)


def reversed_layers(problem: PlacementProblem) -> PlacementProblem:
    return replace(
        problem,
        inter=problem.inter[::-1].transpose(0, 2, 1),
        intra=problem.intra[::-1],
        load=problem.load[::-1],
        replica_of=problem.replica_ids[::-1],
    )


def test_tracks_that_never_meet_get_a_part_each() -> None:
    track = np.array([[0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]])  # track of each expert, layer by layer
    together = (track[:-1, :, None] == track[1:, None, :]).astype(np.float64)
    problem = PlacementProblem(together, np.zeros((3, 4, 4)), np.ones((3, 4)), num_parts=2)
    assignment = viterbi(problem)
    assert problem.cost(assignment) == 0
    assert np.array_equal(assignment == assignment[0, 0], track == track[0, 0])


def test_transitions_count_labelled_times_unlabelled_partitions(random_problem: ProblemFactory) -> None:
    assert count_transitions(random_problem((1, 8, 2))) == 70 * 35
    assert count_transitions(random_problem((1, 8, 4))) == 2520 * 105
    assert count_transitions(random_problem((1, 16, 2))) == 12870 * 6435
    assert count_transitions(random_problem((1, 8, 1))) == 1


def test_too_many_partitions_are_refused_with_the_numbers(random_problem: ProblemFactory) -> None:
    problem = random_problem((2, 16, 4))
    assert not is_exactly_solvable(problem)
    with pytest.raises(
        InputError, match=r"16 experts on 4 parts give 1.7e\+14 transitions .* use method search"
    ):
        solve_exactly(problem)
    assert is_exactly_solvable(random_problem((2, 256, 256)))


def test_small_blocks_change_nothing(random_problem: ProblemFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem((4, 6, 3))
    whole = viterbi(problem)
    monkeypatch.setattr(exact, "_BLOCK", 200)  # two of the 15 canonical partitions at a time
    assert np.array_equal(viterbi(problem), whole)


@pytest.mark.data
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_mixtral_is_solved_to_the_optimum_in_seconds(parts: int) -> None:
    if not MIXTRAL.exists():
        pytest.skip(f"no routing trace at {MIXTRAL}")
    first_choice = np.load(MIXTRAL, allow_pickle=False)["experts"][:, :, 0]
    trace = RoutingTrace.from_arrays(first_choice, num_experts=8)
    ones = np.ones((trace.num_layers, 8), dtype=np.int64)
    topology, objective = Topology(gpus_per_node=parts), Objective(balance_price=0)
    problem = make_problem([count_affinity(trace)], [1.0], topology, objective, ones)
    began = perf_counter()
    cost = problem.cost(solve_exactly(problem))
    assert perf_counter() - began < 5
    boundaries = problem.num_layers - 1
    assert cost < 0.85 * problem.cost(contiguous(*problem.shape)) < boundaries
