"""The paper's integer program, over counts instead of single tokens, built in PuLP and solved by HiGHS.

ExFlow (Yao et al., IPDPS 2024): x[i, j, g] = 1 if expert i of layer j is on GPU g, R[k, j] = 1 if token k
changes GPU after layer j; minimise the sum of R. Tokens that take the same step share their fate, so here one
variable stands for each pair of experts, and its price says how many tokens take it.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

import highspy
import numpy as np
import pulp

from exflow.errors import InputError
from exflow.placement.solve.problem import Assignment, PlacementProblem

# PuLP takes a quarter of a minute to write this many down; branch and bound gets nowhere with more.
MAX_CONSTRAINTS = 500_000
_TOLERANCE = 1e-6  # HiGHS's, on the cost of what it found

Expert = tuple[int, int]  # (layer, expert)
BoundReport = Callable[[float, float], None]


@dataclass(frozen=True)
class IntegerProgram:
    """The program and its variables: `on` says where an expert is, `apart` whether a priced pair is split."""

    program: pulp.LpProblem
    on: dict[tuple[int, int, int], pulp.LpVariable]  # (layer, expert, part) -> binary
    apart: dict[tuple[Expert, Expert], pulp.LpVariable]  # -> [0, 1]
    busiest: dict[int, pulp.LpVariable]  # layer -> load of its busiest part, where that has a price


@dataclass(frozen=True)
class IlpResult:
    assignment: Assignment  # [L, E]
    lower_bound: float  # no feasible assignment is cheaper
    optimal: bool  # proven


def build_program(problem: PlacementProblem) -> IntegerProgram:
    """The integer program; every constraint has a name that says what it is about.

    Its cost is that of the problem but for a constant, and for imbalance, which no line tells: the most
    loaded part stands for the soft maximum, which is never less. So its bounds are bounds on the problem's
    cost.

    Raises InputError if the problem is too large to be written down, or has unequal distances.
    """
    if not problem.is_uniform:
        raise InputError("method ilp: does not know unequal distances between parts; use method search")
    layers, experts, parts = (range(size) for size in problem.shape)
    prices = _priced_pairs(problem)
    if len(prices) * problem.num_parts > MAX_CONSTRAINTS:
        raise InputError(
            f"method ilp: {len(prices)} pairs of experts on {problem.num_parts} parts make more than "
            f"{MAX_CONSTRAINTS} constraints; use method search"
        )
    program = pulp.LpProblem("expert_placement", pulp.LpMinimize)

    on = {
        (layer, expert, part): program.add_variable(f"on_l{layer}_e{expert}_g{part}", cat=pulp.LpBinary)
        for layer, expert, part in product(layers, experts, parts)
    }
    apart = {pair: program.add_variable(f"apart_{_pair_name(*pair)}", 0, 1) for pair in prices}

    least = problem.least_soft_maximum.tolist()
    busiest: dict[int, pulp.LpVariable] = {
        layer: program.add_variable(f"busiest_l{layer}", least[layer])
        for layer in np.flatnonzero(problem.balance_price).tolist()
    }

    separation = pulp.lpSum(price * apart[pair] for pair, price in prices.items())
    imbalance = pulp.lpSum(float(problem.balance_price[layer]) * most for layer, most in busiest.items())
    constant = problem.constant - float(problem.balance_price @ problem.least_soft_maximum)
    program += separation + imbalance + constant, "cost"

    for layer, expert in product(layers, experts):
        program += pulp.lpSum(on[layer, expert, part] for part in parts) == 1, f"one_gpu_l{layer}_e{expert}"
    for layer, part in product(layers, parts):
        occupied = pulp.lpSum(on[layer, expert, part] for expert in experts)
        program += occupied == problem.experts_per_part, f"slots_l{layer}_g{part}"
    for layer, part in product(np.flatnonzero(np.isfinite(problem.max_load)).tolist(), parts):
        held = pulp.lpSum(float(problem.load[layer, expert]) * on[layer, expert, part] for expert in experts)
        program += held <= float(problem.max_load[layer]), f"load_l{layer}_g{part}"
    for (layer, most), part in product(busiest.items(), parts):
        held = pulp.lpSum(float(problem.load[layer, expert]) * on[layer, expert, part] for expert in experts)
        program += held <= most, f"busiest_l{layer}_g{part}"
    for layer, pair in product(layers, combinations(experts, 2)):
        if problem.replica_ids[layer, pair[0]] == problem.replica_ids[layer, pair[1]]:
            for part in parts:
                both = on[layer, pair[0], part] + on[layer, pair[1], part]
                program += both <= 1, f"replicas_l{layer}_e{pair[0]}_e{pair[1]}_g{part}"
    for (one, other), part in product(prices, parts):
        leaves = on[*one, part] - on[*other, part]
        program += apart[one, other] >= leaves, f"apart_{_pair_name(one, other)}_g{part}"
    for (one, layer), others in _partners(prices).items():
        together = problem.experts_per_part - (layer == one[0])
        least = len(others) - together
        program += (
            pulp.lpSum(apart[pair] for pair in others) >= least,
            f"partners_l{one[0]}_e{one[1]}_l{layer}",
        )
    if problem.anchor is not None:
        stays = [
            on[layer, expert, problem.anchor[layer, expert]] for layer, expert in product(layers, experts)
        ]
        program += pulp.lpSum(stays) >= problem.load.size - (problem.max_moves or 0), "moves"
        return IntegerProgram(program, on, apart, busiest)  # the anchor names the parts
    for expert, part in product(experts, parts):
        if part > expert:  # parts are named in the order in which layer 0's experts come to them
            program += on[0, expert, part] == 0, f"symmetry_e{expert}_g{part}"
    return IntegerProgram(program, on, apart, busiest)


def solve_program(
    problem: PlacementProblem,
    start: Assignment,
    *,
    time_limit: float = math.inf,
    report: BoundReport | None = None,
) -> IlpResult:
    """Improve `start` [L, E] (feasible) by branch and bound, until proven optimal or out of time (seconds).

    The result is never dearer than `start`, which HiGHS gets as its first solution. Ctrl-C ends the solve
    like the time limit. `report` is called now and then with the best cost and the best bound so far.
    """
    assert problem.is_feasible(start)
    model = build_program(problem)
    highs = model.program.solverModel = _SilentHighs()  # type: ignore[no-untyped-call]
    for option, value in {"time_limit": time_limit, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0}.items():
        highs.setOptionValue(option, value)
    pulp.HiGHS().buildSolverModel(model.program)
    highs.changeObjectiveOffset(model.program.objective.constant)  # PuLP leaves it out
    _give_start(problem, model, highs, _named_by_first_layer(problem, start))
    _run(highs, report)

    info, found = highs.getInfo(), start
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        found = _read_assignment(problem, model, highs)
    keeps_cap = problem.is_feasible(found)  # HiGHS's tolerance may let a few pairs too many through
    best = min(start, found, key=problem.cost) if keeps_cap else start
    cost, bound = problem.cost(best), info.mip_dual_bound
    solved = keeps_cap and highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    proven = solved and cost <= info.objective_function_value + _TOLERANCE * abs(cost)
    if proven or not math.isfinite(bound):
        bound = cost if proven else -math.inf
    return IlpResult(best, min(bound, cost), proven)


class _SilentHighs(highspy.Highs):
    """HiGHS that prints nothing: turned off before its constructor's first call, which prints a banner."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("log_to_console", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


def _priced_pairs(problem: PlacementProblem) -> dict[tuple[Expert, Expert], float]:
    """The pairs of experts whose separation costs something, between adjacent layers and inside a layer."""
    layers, experts, _ = (range(size) for size in problem.shape)
    between = {
        ((layer, e), (layer + 1, f)): float(problem.inter[layer, e, f])
        for layer, e, f in product(layers[:-1], experts, experts)
    }
    within = {
        ((layer, e), (layer, f)): float(problem.intra[layer, e, f])
        for layer, (e, f) in product(layers, combinations(experts, 2))
    }
    return {pair: price for pair, price in (between | within).items() if price > 0}


def _partners(
    prices: dict[tuple[Expert, Expert], float],
) -> dict[tuple[Expert, int], list[tuple[Expert, Expert]]]:
    """The priced pairs of every expert with the experts of one layer, its own or an adjacent one."""
    partners = defaultdict(list)
    for one, other in prices:
        partners[one, other[0]].append((one, other))
        partners[other, one[0]].append((one, other))
    return partners


def _pair_name(one: Expert, other: Expert) -> str:
    return f"l{one[0]}_e{one[1]}_l{other[0]}_e{other[1]}"


def _named_by_first_layer(problem: PlacementProblem, assignment: Assignment) -> Assignment:
    """The same assignment with its parts named as the symmetry constraints want them, if there are any."""
    if problem.anchor is not None:
        return assignment
    _, first_expert = np.unique(assignment[0], return_index=True)
    return np.asarray(first_expert.argsort().argsort()[assignment])


def _give_start(
    problem: PlacementProblem, model: IntegerProgram, highs: highspy.Highs, start: Assignment
) -> None:
    """Hand HiGHS a full first solution. (PuLP's own warmStart option does nothing with HiGHS in-process.)"""
    values = np.zeros(len(model.program.variables()))
    for layer, variable in model.busiest.items():
        values[variable.index] = max(variable.lowBound, problem.part_loads(start)[layer].max())
    for (layer, expert, part), variable in model.on.items():
        values[variable.index] = start[layer, expert] == part
    for (one, other), variable in model.apart.items():
        values[variable.index] = start[one] != start[other]
    solution = highspy.HighsSolution()
    solution.col_value = values.tolist()
    highs.setSolution(solution)


def _run(highs: highspy.Highs, report: BoundReport | None) -> None:
    """Solve in HiGHS's own thread, so that Ctrl-C reaches this one."""

    def tell(event: highspy.highs.HighsCallbackEvent) -> None:
        if report:
            report(event.data_out.mip_primal_bound, event.data_out.mip_dual_bound)

    highs.cbMipLogging += tell
    highs.HandleUserInterrupt = True
    highs.startSolve()
    done = False
    while not done:
        try:
            done, _ = highs.wait(0.1)
        except KeyboardInterrupt:
            highs.cancelSolve()  # type: ignore[no-untyped-call]


def _read_assignment(problem: PlacementProblem, model: IntegerProgram, highs: highspy.Highs) -> Assignment:
    values = np.asarray(highs.getSolution().col_value)
    weight = np.zeros(problem.shape)
    for index, variable in model.on.items():
        weight[index] = values[variable.index]
    return np.asarray(weight.argmax(axis=2))
