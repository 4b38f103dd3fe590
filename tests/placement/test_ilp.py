import _thread
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.solve import ilp
from exflow.placement.solve.baselines import contiguous, random
from exflow.placement.solve.exact import brute_force, solve_exactly
from exflow.placement.solve.ilp import build_program, solve_program
from exflow.placement.solve.problem import NORM, PlacementProblem
from exflow.placement.solve.start import balanced_start

ProblemFactory = Callable[..., PlacementProblem]


@pytest.mark.parametrize(
    "shape", [(2, 4, 2), (3, 4, 2), (4, 4, 4), (1, 6, 3), (2, 6, 2), (3, 4, 1), (1, 2, 2)]
)
@pytest.mark.parametrize("seed", range(2))
def test_the_program_finds_and_proves_the_optimum(
    random_problem: ProblemFactory, shape: tuple[int, int, int], seed: int
) -> None:
    problem = random_problem(shape, seed)
    result = solve_program(problem, random(*shape, seed))
    assert result.optimal
    assert problem.is_balanced(result.assignment)
    optimum = problem.cost(solve_exactly(problem))
    assert problem.cost(result.assignment) == result.lower_bound == optimum


@pytest.mark.parametrize("shape", [(2, 4, 2), (3, 4, 2), (1, 6, 3)])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("balance_price", [1, 30])
def test_with_a_price_of_imbalance_the_bound_holds(
    random_problem: ProblemFactory, shape: tuple[int, int, int], seed: int, balance_price: int
) -> None:
    problem = random_problem(shape, seed, balance_price=balance_price)
    start = random(*shape, seed)
    result = solve_program(problem, start)
    optimum, cost = problem.cost(brute_force(problem)), problem.cost(result.assignment)
    assert problem.is_feasible(result.assignment)
    assert result.lower_bound <= optimum + 1e-6
    assert optimum - 1e-9 <= cost <= problem.cost(start)
    assert cost - optimum <= balance_price * (problem.num_parts ** (1 / NORM) - 1) * problem.load.sum()
    assert not result.optimal or cost == pytest.approx(optimum)


@pytest.mark.parametrize(
    "kind",
    [{"replicas": True}, {"anchor": 2}, {"anchor": 3}, {"anchor": 0}, {"replicas": True, "anchor": 4}],
)
@pytest.mark.parametrize(("shape", "seed"), [((2, 4, 2), 0), ((2, 4, 2), 1), ((3, 4, 2), 0), ((1, 6, 3), 0)])
def test_replicas_and_anchors_are_solved_to_the_optimum(
    random_problem: ProblemFactory, kind: dict[str, Any], shape: tuple[int, int, int], seed: int
) -> None:
    problem = random_problem(shape, seed, **kind)
    result = solve_program(problem, balanced_start(problem))
    assert problem.is_feasible(result.assignment)
    optimum = problem.cost(brute_force(problem))
    assert problem.cost(result.assignment) == pytest.approx(optimum)
    assert result.optimal
    assert result.lower_bound == pytest.approx(optimum)


def test_unequal_distances_are_refused(random_problem: ProblemFactory) -> None:
    with pytest.raises(InputError, match=r"method ilp: does not know unequal distances .* use method search"):
        build_program(random_problem((2, 4, 4), distance="nodes"))


def test_constraints_for_limits_are_named_too(random_problem: ProblemFactory) -> None:
    problem = random_problem((2, 4, 2), balance_price=1, replicas=True, anchor=2)
    names = {constraint.name for constraint in build_program(problem).program.constraints()}
    assert {"busiest_l0_g0", "busiest_l1_g1", "moves"} <= names
    assert any(re.fullmatch(r"replicas_l\d_e\d_e\d_g\d", name) for name in names)
    assert not any(name.startswith("symmetry") for name in names)


def test_constraints_are_named_for_what_they_say(random_problem: ProblemFactory) -> None:
    program = build_program(random_problem((2, 4, 2))).program
    by_name = {constraint.name: constraint for constraint in program.constraints()}
    kinds = {
        r"one_gpu_l\d_e\d": 2 * 4,
        r"slots_l\d_g\d": 2 * 2,
        r"symmetry_e0_g1": 1,
    }
    for pattern, count in kinds.items():
        assert sum(bool(re.fullmatch(pattern, name)) for name in by_name) == count
    patterns = [*kinds, r"apart_l\d_e\d_l\d_e\d_g\d", r"partners_l\d_e\d_l\d"]
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in by_name)
    assert "on_l1_e2_g0" in str(by_name["one_gpu_l1_e2"])


def test_no_constraint_excludes_a_balanced_assignment(random_problem: ProblemFactory) -> None:
    problem = random_problem((3, 6, 3))
    for seed in range(10):
        start = ilp._named_by_first_layer(problem, random(3, 6, 3, seed))
        model = build_program(problem)
        for (layer, expert, part), variable in model.on.items():
            variable.setInitialValue(int(start[layer, expert] == part))
        for (one, other), variable in model.apart.items():
            variable.setInitialValue(int(start[one] != start[other]))
        assert model.program.valid()
        assert model.program.objective.value() == problem.cost(start)


def test_names_by_first_layer_keep_the_placement(random_problem: ProblemFactory) -> None:
    assignment = np.array([[2, 0, 1], [0, 1, 2]])
    assert ilp._named_by_first_layer(random_problem((2, 3, 3)), assignment).tolist() == [[0, 1, 2], [1, 2, 0]]
    anchored = random_problem((2, 3, 3), anchor=2)
    assert ilp._named_by_first_layer(anchored, assignment) is assignment


def test_the_solver_starts_from_the_start(random_problem: ProblemFactory) -> None:
    """HiGHS without any time knows exactly one solution: the one it was given."""
    problem = random_problem((8, 8, 4))
    start = random(8, 8, 4, seed=5)
    reports: list[tuple[float, float]] = []
    result = solve_program(
        problem, start, time_limit=0, report=lambda cost, bound: reports.append((cost, bound))
    )
    assert reports[0][0] == pytest.approx(problem.cost(start))
    assert problem.cost(result.assignment) == problem.cost(start)
    assert not result.optimal
    assert result.lower_bound <= problem.cost(solve_exactly(problem))


def test_out_of_time_is_not_optimal(random_problem: ProblemFactory) -> None:
    problem = random_problem((10, 8, 4))
    start = contiguous(10, 8, 4)
    result = solve_program(problem, start, time_limit=0.5)
    optimum = problem.cost(solve_exactly(problem))
    assert not result.optimal
    assert 0 <= result.lower_bound <= optimum <= problem.cost(result.assignment) <= problem.cost(start)
    assert math.isfinite(result.lower_bound)


def test_interrupt_ends_the_solve_with_a_solution(random_problem: ProblemFactory) -> None:
    problem = random_problem((10, 8, 4))
    start = contiguous(10, 8, 4)
    interrupted: list[float] = []

    def interrupt(cost: float, bound: float) -> None:
        if not interrupted:
            _thread.interrupt_main()
        interrupted.append(cost)

    result = solve_program(problem, start, time_limit=60, report=interrupt)
    assert interrupted
    assert not result.optimal
    assert problem.cost(result.assignment) <= problem.cost(start)


def test_the_solver_is_silent(random_problem: ProblemFactory, capfd: pytest.CaptureFixture[str]) -> None:
    solve_program(random_problem((2, 4, 2)), contiguous(2, 4, 2))
    assert capfd.readouterr() == ("", "")


def test_programs_too_large_are_refused_with_the_numbers(
    random_problem: ProblemFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ilp, "MAX_CONSTRAINTS", 10)
    with pytest.raises(InputError, match=r"\d+ pairs of experts on 2 parts make more than 10 constraints"):
        build_program(random_problem((2, 4, 2)))
