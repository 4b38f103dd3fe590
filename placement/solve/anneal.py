"""Annealed swaps: the search for problems too large to solve exactly.

Swaps of two experts of one layer are tried at falling temperatures (`swaps`). After every temperature the
parts of whole layers are renamed for the best (`align_layers`), a step that swaps cannot take; the end is
`sweep`.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from threading import Event
from time import monotonic

import numpy as np

from exflow.errors import InputError
from exflow.placement.solve.baselines import contiguous, random
from exflow.placement.solve.descent import Stop, align_layers, sweep
from exflow.placement.solve.neighbourhood import share_out_anew
from exflow.placement.solve.problem import Assignment, PlacementProblem, Prices
from exflow.placement.solve.start import balanced_start
from exflow.placement.solve.swaps import fixed, sample_prices, state, try_swaps

Report = Callable[[float], None]
_MOST_TRIALS = 10**8  # of all starts together, some ten seconds on two cores
_FROZEN = 1e-300  # the temperature at which no swap is taken that costs anything
_LOOKS = 20  # at the cost of an assignment, that the shortest search needs time for
_SAMPLES = 32  # swaps tried with each expert, to learn what prices are usual
_MOST_SAMPLED = 200_000_000  # prices of pairs looked at for that


@dataclass(frozen=True)
class SearchSettings:
    """Schedule of the annealing. Raises InputError on values that make no schedule.

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


def settings_for(problem: PlacementProblem) -> SearchSettings:
    """The default settings, with fewer starts and then fewer passes where trials are many."""
    settings = SearchSettings()
    trials = settings.levels * settings.passes * problem.load.size
    if not problem.is_uniform:  # a trial looks at all parts
        trials *= 1 + problem.num_parts // 16
    starts = min(settings.starts, max(2, _MOST_TRIALS // trials))
    passes = min(settings.passes, max(3, _MOST_TRIALS * settings.passes // (starts * trials)))
    return replace(settings, starts=starts, passes=passes)


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

    By default `start` is the anchor, or the contiguous assignment, or where that breaks a limit a balanced
    one. Raises InputError if there is none under the cap.

    The amount of work is fixed by `settings`: the same seed gives the same assignment, unless `time_limit`
    (seconds) ends the runs before that. Ctrl-C ends them too; either way the best assignment so far is
    returned. `report` is called now and then with the least cost so far.
    """
    return search_all(problem, start, seed=seed, settings=settings, time_limit=time_limit, report=report)[0]


def search_all(
    problem: PlacementProblem,
    start: Assignment | None = None,
    *,
    seed: int = 0,
    settings: SearchSettings | None = None,
    time_limit: float = math.inf,
    report: Report | None = None,
    other: Assignment | None = None,
    interrupted: Event | None = None,
) -> list[Assignment]:
    """Run the search and return the assignment that each run found, the best first (see `search`).

    The second run begins with what `sweep` makes of `other` [L, E] (feasible; by default `start`). Ctrl-C
    sets `interrupted`, so that the caller can stop too. Where the time is too short to search at all, the
    start is the result.
    """
    settings = settings or settings_for(problem)
    first = balanced_start(problem) if start is None else start
    assert problem.is_feasible(first)
    began = monotonic()
    problem.cost(first)
    if _LOOKS * (monotonic() - began) > time_limit:
        return [first]
    _compile()
    deviation = swap_deviation(problem, np.random.default_rng(seed))
    temperatures = np.geomspace(settings.hot, settings.cold, settings.levels) * deviation
    costs = [math.inf] * settings.starts
    interrupted = interrupted or Event()
    deadline = monotonic() + time_limit

    def stop() -> bool:
        return interrupted.is_set() or monotonic() >= deadline

    def run(index: int) -> tuple[float, Assignment]:
        def note(cost: float) -> None:
            costs[index] = cost

        rng = np.random.default_rng([seed, index])
        begin = _start(problem, first, first if other is None else other, seed, index, stop)
        return anneal(problem, begin, temperatures, settings.passes, rng, stop, note)

    with ThreadPoolExecutor(max_workers=min(settings.starts, os.cpu_count() or 1)) as pool:
        runs = [pool.submit(run, index) for index in range(settings.starts)]
        try:
            _watch(runs, costs, report)
        except KeyboardInterrupt:
            interrupted.set()
        results = sorted((run.result() for run in runs), key=lambda result: result[0])
    best, *others = [assignment for _, assignment in results]
    try:
        best = share_out_anew(problem, best, stop)
    except KeyboardInterrupt:
        interrupted.set()  # for the steps that follow, the time is up: the best so far is taken
    return [best, *others]


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
    prices = fixed(problem)
    for temperature in temperatures:
        if stop() or temperature == 0:  # 0: all swaps cost the same
            break
        now = state(problem, assignment)
        for _ in range(passes):
            if stop():
                break
            try_swaps(prices, now, temperature, 1, rng)
        assignment = align_layers(problem, now.assignment)
        if (level_cost := problem.cost(assignment)) < cost:
            cost, best = level_cost, assignment
        note(cost)
    if stop():
        return cost, best
    downhill = state(problem, best)
    try_swaps(prices, downhill, _FROZEN, passes, rng)
    best = sweep(problem, downhill.assignment, stop)
    note(cost := problem.cost(best))
    return cost, best


def swap_deviation(problem: PlacementProblem, rng: np.random.Generator) -> float:
    """The standard deviation of the price of a swap in a random assignment, from a sample; 0 for one part."""
    assignment = rng.permuted(contiguous(*problem.shape), axis=1)
    entries = assignment.size * problem.num_experts  # that are looked at for a swap of each expert
    samples = max(1, min(_SAMPLES, _MOST_SAMPLED // entries))
    prices = sample_prices(fixed(problem), state(problem, assignment), samples, rng)
    return float(prices[prices != 0].std()) if prices.any() else 0.0


def _compile() -> None:
    """Have numba compile what a run needs, or load it from its cache, before the clock starts."""
    tiny = PlacementProblem(np.zeros((1, 2, 2)), np.zeros((2, 2, 2)), np.ones((2, 2)), num_parts=2)
    anneal(tiny, contiguous(*tiny.shape), np.ones(1), 1, np.random.default_rng(0))


def _start(
    problem: PlacementProblem, first: Assignment, other: Assignment, seed: int, index: int, stop: Stop
) -> Assignment:
    """Start of run `index`: the first assignment, then `sweep` of the other, then random ones; under limits,
    the first one after random swaps."""
    if index == 0:
        return first
    if index == 1:
        return sweep(problem, other, stop)
    start: Assignment = random(*problem.shape, seed=seed + index)
    if problem.is_feasible(start):
        return start
    rng = np.random.default_rng([seed, index, 1])
    now = state(problem, first)
    try_swaps(fixed(problem), now, math.inf, _SAMPLES, rng)
    return now.assignment


def _watch(runs: list[Future[tuple[float, Assignment]]], costs: list[float], report: Report | None) -> None:
    pending = set(runs)
    while pending:
        pending = wait(pending, timeout=0.1).not_done
        if report and min(costs) < math.inf:
            report(min(costs))
