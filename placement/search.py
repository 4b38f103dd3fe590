"""Annealed swaps: the search for problems too large to solve exactly.

State: an assignment, and for every expert and part the prices that tie the expert to that part
(`pull`, [L, G, E]). A trial swaps two experts of one layer; thanks to `pull` its price is four look-ups and
only an accepted swap costs O(E). A swap that takes a part over the cap is refused. After every temperature
the parts of whole layers are renamed for the best (`align_layers`), a step that swaps cannot take; the end is
`sweep`.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from time import monotonic

import numpy as np
from numba import njit

from exflow.errors import InputError
from exflow.placement.balance import balanced_start
from exflow.placement.baselines import contiguous, random
from exflow.placement.problem import Assignment, PlacementProblem, Prices
from exflow.placement.sweep import Stop, align_layers, one_hot, sweep

Report = Callable[[float], None]
_SAMPLES = 32  # swaps tried with each expert, to learn what prices are usual


@dataclass(frozen=True)
class SearchSettings:
    """How long and how hot to anneal. Raises InputError on values that make no schedule.

    starts      independent runs, each from another assignment; the best result counts
    levels      number of temperatures, falling geometrically from `hot` to `cold`
    passes      at each temperature, how often each expert is tried against another
    hot, cold   in units of the standard deviation of a swap's price in a random assignment
    """

    starts: int = 8
    levels: int = 100
    passes: int = 30
    hot: float = 1.0
    cold: float = 0.02

    def __post_init__(self) -> None:
        for name in ("starts", "levels", "passes"):
            if getattr(self, name) < 1:
                raise InputError(f"search: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.cold <= self.hot < math.inf:
            raise InputError(f"search: cold is {self.cold} and hot {self.hot}; choose 0 < cold <= hot")


def search(
    problem: PlacementProblem,
    start: Assignment | None = None,
    *,
    seed: int = 0,
    settings: SearchSettings | None = None,
    time_limit: float = math.inf,
    report: Report | None = None,
) -> Assignment:
    """The best feasible assignment [L, E] of several annealed runs; never dearer than `start` (feasible).

    By default `start` is the contiguous assignment, or where that breaks the cap a balanced one. Raises
    InputError if there is none under the cap.

    The amount of work is fixed by `settings`: the same seed gives the same assignment, unless `time_limit`
    (seconds) ends the runs before that. Ctrl-C ends them too; either way the best assignment so far is
    returned. `report` is called now and then with the least cost so far.
    """
    settings = settings or SearchSettings()
    first = balanced_start(problem) if start is None else start
    assert problem.is_feasible(first)
    _compile()
    deviation = swap_deviation(problem, np.random.default_rng(seed))
    temperatures = np.geomspace(settings.hot, settings.cold, settings.levels) * deviation
    costs = [math.inf] * settings.starts
    interrupted = Event()
    deadline = monotonic() + time_limit

    def stop() -> bool:
        return interrupted.is_set() or monotonic() >= deadline

    def run(index: int) -> tuple[float, Assignment]:
        def note(cost: float) -> None:
            costs[index] = cost

        rng = np.random.default_rng([seed, index])
        begin = _start(problem, first, seed, index, stop)
        return anneal(problem, begin, temperatures, settings.passes, rng, stop, note)

    with ThreadPoolExecutor(max_workers=min(settings.starts, os.cpu_count() or 1)) as pool:
        runs = [pool.submit(run, index) for index in range(settings.starts)]
        try:
            _watch(runs, costs, report)
        except KeyboardInterrupt:
            interrupted.set()
        return min((run.result() for run in runs), key=lambda result: result[0])[1]


def anneal(
    problem: PlacementProblem,
    assignment: Assignment,
    temperatures: Prices,
    passes: int,
    rng: np.random.Generator,
    stop: Stop = lambda: False,
    note: Report = lambda cost: None,
) -> tuple[float, Assignment]:
    """(cost, assignment) of the best state after any temperature of one run, taken downhill by `sweep`."""
    cost, best = problem.cost(assignment), assignment
    inter_back = np.ascontiguousarray(problem.inter.transpose(0, 2, 1))
    for temperature in temperatures:
        if stop() or temperature == 0:  # 0: all swaps cost the same
            break
        assignment = try_swaps(problem, inter_back, assignment, temperature, passes, rng)
        assignment = align_layers(problem, assignment)
        if (level_cost := problem.cost(assignment)) < cost:
            cost, best = level_cost, assignment
        note(cost)
    best = sweep(problem, best, stop)
    note(cost := problem.cost(best))
    return cost, best


def try_swaps(
    problem: PlacementProblem,
    inter_back: Prices,
    assignment: Assignment,
    temperature: float,
    passes: int,
    rng: np.random.Generator,
) -> Assignment:
    """What is left of a feasible assignment after `passes` at one temperature; feasible again."""
    assignment = assignment.copy()
    pull, held = pulls(problem, assignment), problem.part_loads(assignment)
    _try_swaps(
        problem.inter,
        inter_back,
        problem.intra,
        problem.load,
        problem.max_load,
        assignment,
        pull,
        held,
        temperature,
        passes,
        rng,
    )
    return assignment


def pulls(problem: PlacementProblem, assignment: Assignment) -> Prices:
    """[L, G, E]: the sum of the prices between an expert and those on a part, in its layer and beside it."""
    hot = one_hot(assignment, problem.num_parts)
    pull = problem.intra @ hot
    pull[:-1] += problem.inter @ hot[1:]
    pull[1:] += problem.inter.transpose(0, 2, 1) @ hot[:-1]
    return np.ascontiguousarray(pull.transpose(0, 2, 1))


def swap_deviation(problem: PlacementProblem, rng: np.random.Generator) -> float:
    """The standard deviation of the price of a swap in a random assignment, from a sample; 0 for one part."""
    assignment = rng.permuted(contiguous(*problem.shape), axis=1)
    pull = pulls(problem, assignment)
    layer, e = np.indices(assignment.shape)
    f = rng.integers(problem.num_experts, size=(_SAMPLES, *assignment.shape))
    p, q = np.broadcast_arrays(assignment, assignment[layer, f])
    price = pull[layer, p, e] - pull[layer, q, e] + pull[layer, q, f] - pull[layer, p, f]
    price += 2 * problem.intra[layer, e, f]
    return float(price[p != q].std()) if (p != q).any() else 0.0


def _compile() -> None:
    """Have numba compile what a run needs, or load it from its cache, before the clock starts."""
    tiny = PlacementProblem(np.zeros((1, 2, 2)), np.zeros((2, 2, 2)), np.ones((2, 2)), num_parts=2)
    anneal(tiny, contiguous(*tiny.shape), np.ones(1), 1, np.random.default_rng(0))


def _start(problem: PlacementProblem, first: Assignment, seed: int, index: int, stop: Stop) -> Assignment:
    """The first assignment, what `sweep` makes of it, then random ones; under a cap, random swaps away."""
    if index == 0:
        return first
    if index == 1:
        return sweep(problem, first, stop)
    if np.isinf(problem.max_load).all():
        return random(*problem.shape, seed=seed + index)
    rng = np.random.default_rng([seed, index, 1])
    inter_back = np.ascontiguousarray(problem.inter.transpose(0, 2, 1))
    return try_swaps(problem, inter_back, first, math.inf, _SAMPLES, rng)


def _watch(runs: list[Future[tuple[float, Assignment]]], costs: list[float], report: Report | None) -> None:
    pending = set(runs)
    while pending:
        pending = wait(pending, timeout=0.1).not_done
        if report and min(costs) < math.inf:
            report(min(costs))


@njit(cache=True, nogil=True)
def _try_swaps(
    inter: Prices,  # [L-1, E, E]
    inter_back: Prices,  # the same with its experts exchanged, for rows that lie together
    intra: Prices,  # [L, E, E]
    load: Prices,  # [L, E]
    max_load: Prices,  # [L]
    assignment: Assignment,  # changed in place
    pull: Prices,  # [L, G, E], kept up to date
    held: Prices,  # [L, G] the load of every part, kept up to date
    temperature: float,
    passes: int,
    rng: np.random.Generator,
) -> None:
    """Metropolis: in every pass each expert is tried against a random one of its layer."""
    num_layers, num_experts = assignment.shape
    for _ in range(passes):
        for layer in range(num_layers):
            parts, pulled, within = assignment[layer], pull[layer], intra[layer]
            for e in range(num_experts):
                f = int(rng.random() * num_experts)
                p, q = parts[e], parts[f]
                if p == q:
                    continue
                more = load[layer, f] - load[layer, e]
                if held[layer, p] + more > max_load[layer] or held[layer, q] - more > max_load[layer]:
                    continue
                price = pulled[p, e] - pulled[q, e] + pulled[q, f] - pulled[p, f] + 2 * within[e, f]
                if price > 0 and rng.random() >= math.exp(-price / temperature):
                    continue
                parts[e], parts[f] = q, p
                held[layer, p] += more
                held[layer, q] -= more
                _move_pull(within[e], within[f], pulled[p], pulled[q])
                if layer > 0:
                    back = inter_back[layer - 1]
                    _move_pull(back[e], back[f], pull[layer - 1, p], pull[layer - 1, q])
                if layer + 1 < num_layers:
                    _move_pull(inter[layer, e], inter[layer, f], pull[layer + 1, p], pull[layer + 1, q])


@njit(cache=True, nogil=True)
def _move_pull(of_e: Prices, of_f: Prices, pull_p: Prices, pull_q: Prices) -> None:
    """Expert e has left part p for q, and f the other way."""
    for expert in range(len(of_e)):
        change = of_f[expert] - of_e[expert]
        pull_p[expert] += change
        pull_q[expert] -= change
