"""The cap on load, through every method: kept, and no dearer than it must be."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.anneal import SearchSettings, search
from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.chains import swap_chain
from exflow.placement.solve.descent import sweep
from exflow.placement.solve.exact import brute_force, solve_exactly, viterbi
from exflow.placement.solve.ilp import build_program, solve_program
from exflow.placement.solve.objective import Objective
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.solve.solve import METHODS, solve
from exflow.placement.solve.start import balanced_start
from exflow.placement.solve.swaps import fixed, state, try_swaps
from exflow.profiling.trace import RoutingTrace

ProblemFactory = Callable[..., PlacementProblem]

SHORT = SearchSettings(starts=3, levels=20, passes=10)


@pytest.fixture(scope="session")
def capped(random_problem: ProblemFactory) -> ProblemFactory:
    """A random problem with whole loads, and in each layer a cap between its tightest and its loosest."""

    def make(
        shape: tuple[int, int, int], seed: int = 0, slack: float = 0.3, balance_price: float = 0
    ) -> PlacementProblem:
        rng = np.random.default_rng([seed, 1])
        problem = random_problem(shape, seed, load=True, balance_price=balance_price)
        candidates = np.stack([rng.permuted(contiguous(*shape), axis=1) for _ in range(50)])
        busiest = np.stack([problem.part_loads(candidate).max(axis=1) for candidate in candidates])
        least, most = busiest.min(axis=0), busiest.max(axis=0)
        return replace(problem, max_load=np.floor(least + slack * (most - least)))

    return make


def skewed_trace(seed: int = 0, tokens: int = 400, layers: int = 4, experts: int = 8) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(experts, 2.0), layers)
    chosen = np.stack([rng.choice(experts, tokens, p=row) for row in share], axis=1)
    chosen = np.where(rng.random(chosen.shape) < 0.4, np.roll(chosen, 1, axis=1), chosen)
    second = (chosen + rng.integers(1, experts, chosen.shape)) % experts
    return RoutingTrace.from_arrays(np.stack([chosen, second], axis=2).astype(np.uint8), num_experts=experts)


@given(
    shape=st.sampled_from([(1, 4, 2), (3, 4, 2), (2, 6, 2), (2, 6, 3), (3, 3, 3), (2, 4, 1)]),
    seed=st.integers(0, 10**6),
    slack=st.sampled_from([0.0, 0.2, 0.6]),
    balance_price=st.sampled_from([0, 3, 50]),
)
@settings(max_examples=20, deadline=None)
def test_exact_equals_brute_force_and_search_never_beats_it(
    capped: ProblemFactory, shape: tuple[int, int, int], seed: int, slack: float, balance_price: int
) -> None:
    problem = capped(shape, seed, slack, balance_price)
    optimum = problem.cost(brute_force(problem))
    for method in (viterbi, solve_exactly):
        assert problem.is_feasible(method(problem))
        assert problem.cost(method(problem)) == pytest.approx(optimum)
    found = search(problem, seed=seed, settings=SHORT)
    assert problem.is_feasible(found)
    assert problem.cost(found) >= optimum - 1e-9 * abs(optimum)


@given(seed=st.integers(0, 10**6), slack=st.sampled_from([0.0, 0.1, 0.4]))
@settings(max_examples=25, deadline=None)
def test_every_step_keeps_the_cap(capped: ProblemFactory, seed: int, slack: float) -> None:
    problem = capped((4, 12, 3), seed, slack)
    start = balanced_start(problem)
    assert problem.is_feasible(start)
    rng = np.random.default_rng(seed)
    now = state(problem, start)
    try_swaps(fixed(problem), now, np.inf, 10, rng)
    wandered = now.assignment
    for result in (wandered, swap_chain(problem, wandered, 0, 2), sweep(problem, wandered)):
        assert problem.is_feasible(result)
    assert problem.cost(sweep(problem, wandered)) <= problem.cost(wandered)


def test_random_swaps_leave_the_start_far_behind(capped: ProblemFactory) -> None:
    problem = capped((4, 12, 3), 0, 0.5)
    start = balanced_start(problem)
    now = state(problem, start)
    try_swaps(fixed(problem), now, np.inf, 10, np.random.default_rng(0))
    assert (now.assignment != start).mean() > 0.4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("topology", [Topology(gpus_per_node=4), Topology(num_nodes=2, gpus_per_node=2)])
def test_every_method_keeps_the_cap(capped: ProblemFactory, method: str, topology: Topology) -> None:
    problem = capped((3, 8, 4), 0, 0.2)
    solution = solve(problem, topology, method=method, time_limit=1)
    assert problem.is_feasible(solution.assignment)
    assert solution.lower_bound <= problem.cost(solve_exactly(problem)) <= solution.objective
    if topology.num_nodes == 1 and problem.is_feasible(contiguous(3, 8, 4)):
        assert solution.objective <= problem.cost(contiguous(3, 8, 4))


@pytest.mark.parametrize("seed", range(3))
def test_the_program_proves_the_optimum_under_the_cap(capped: ProblemFactory, seed: int) -> None:
    problem = capped((2, 6, 2), seed, 0.2)
    result = solve_program(problem, balanced_start(problem))
    assert result.optimal
    assert problem.is_feasible(result.assignment)
    assert problem.cost(result.assignment) == problem.cost(brute_force(problem))
    names = {constraint.name for constraint in build_program(problem).program.constraints()}
    assert {"load_l0_g0", "load_l0_g1", "load_l1_g0", "load_l1_g1"} <= names


@pytest.mark.parametrize("shape", [(3, 8, 2), (4, 12, 4), (3, 4, 4)])
def test_a_cap_that_binds_nowhere_changes_nothing_found_exactly(
    capped: ProblemFactory, shape: tuple[int, int, int]
) -> None:
    problem = capped(shape, 3)
    free, idle = (replace(problem, max_load=np.array([cap])) for cap in (np.inf, 1e9))
    for method in ("sweep", "exact") if shape != (4, 12, 4) else ("sweep",):
        topology = Topology(gpus_per_node=shape[2])
        results = [solve(each, topology, method=method).assignment for each in (free, idle)]
        assert np.array_equal(*results)


def test_place_keeps_the_cap_it_is_given_and_says_so() -> None:
    trace = skewed_trace()
    free = place(trace, Topology(gpus_per_node=2), objective=Objective(balance_price=0))
    capped_plan = place(
        trace, Topology(gpus_per_node=2), objective=Objective(balance_price=0, max_imbalance=1.05)
    )
    assert free.expected["imbalance"]["max"] > 1.05 >= capped_plan.expected["imbalance"]["max"]
    assert capped_plan.method == "exact"
    assert capped_plan.optimal
    assert free.objective is not None and capped_plan.objective is not None
    assert free.objective <= capped_plan.objective


@given(seed=st.integers(0, 10**6), parts=st.sampled_from([2, 4, 8]), nodes=st.sampled_from([1, 2]))
@settings(max_examples=12, deadline=None)
def test_an_infeasible_cap_names_the_smallest_that_works(seed: int, parts: int, nodes: int) -> None:
    trace, topology = skewed_trace(seed, tokens=97), Topology(num_nodes=nodes, gpus_per_node=parts // nodes)
    solving = Solving("sweep")
    try:
        plan = place(trace, topology, objective=Objective(max_imbalance=1), solving=solving)
    except InputError as error:
        assert "max imbalance 1 cannot be kept" in str(error)
        least = float(str(error).split()[-3])
        plan = place(trace, topology, objective=Objective(max_imbalance=least), solving=solving)
        assert least - 0.00011 <= plan.expected["imbalance"]["max"] <= least
    else:
        assert plan.expected["imbalance"]["max"] == 1


@pytest.mark.parametrize("method", ["contiguous", "random"])
def test_a_baseline_over_the_cap_is_refused(method: str) -> None:
    with pytest.raises(InputError, match=rf"method {method} has imbalance 1\.\d+ in MoE layer \d, over"):
        place(
            skewed_trace(),
            Topology(gpus_per_node=2),
            objective=Objective(max_imbalance=1.01),
            solving=Solving(method),
        )


def test_a_load_equal_to_the_cap_is_allowed() -> None:
    """3 parts, 10 tokens a part on average; 11 on one is 1.1 times the mean, to the last bit."""
    experts = np.repeat(np.arange(3), [11, 10, 9])[:, None].astype(np.uint8)
    trace = RoutingTrace.from_arrays(experts, num_experts=3)
    plan = place(trace, Topology(gpus_per_node=3), objective=Objective(max_imbalance=1.1))
    assert plan.expected["imbalance"]["max"] == 1.1


@pytest.mark.parametrize(
    ("max_load", "message"),
    [
        (np.ones(2), r"max_load: shape \(2,\), expected \(3,\)"),
        (np.ones(3, dtype=np.int64), "max_load: dtype int64, expected float64"),
        (np.array([1.0, -1.0, 1.0]), "max_load: holds negative values or NaN"),
        (np.array([np.nan]), "max_load: holds negative values or NaN"),
    ],
)
def test_max_load_is_checked(random_problem: ProblemFactory, max_load: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(random_problem((3, 4, 2)), max_load=max_load)


def test_feasible_means_balanced_and_under_the_cap(random_problem: ProblemFactory) -> None:
    load = np.array([[3.0, 1, 1, 3], [1, 1, 1, 1]])
    problem = replace(random_problem((2, 4, 2)), load=load, max_load=np.array([4.0]))
    start = contiguous(2, 4, 2)
    assert problem.part_loads(start).tolist() == [[4, 4], [2, 2]]
    assert problem.is_feasible(start)
    assert not problem.is_feasible(np.array([[0, 1, 1, 0], [0, 0, 1, 1]]))  # 6
    assert not problem.is_feasible(np.array([[0, 1, 1, 1], [0, 0, 1, 1]]))  # one and three
    assert problem.restricted(np.array([[0, 1], [0, 1]]), np.arange(2)).max_load.tolist() == [4, 4]
