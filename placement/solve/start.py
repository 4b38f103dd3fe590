"""Load under a cap: a first assignment that keeps it, and what the smallest cap is where there is none.

Layers do not share load, so each is spread by itself: experts of a layer over parts, equally many on each, so
that the busiest part holds little. That is number partitioning, hard in theory and easy in practice.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from exflow.errors import InputError
from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.problem import Assignment, PlacementProblem, Prices
from exflow.placement.solve.swaps import fixed, state, try_swaps

Parts = NDArray[np.int64]  # [E] the part of every expert of one layer
_RANDOM_STARTS = 30
_LEVELS = 40  # of temperature, where swaps are for balance alone
# The integer program is for proofs and the last per mille; over this many variables it finds neither.
_MAX_PROGRAM = 4096
_PROGRAM_NODES = 2000  # ends it the same way each time; the seconds only guard
_PROGRAM_SECONDS = 5.0


def balanced_start(problem: PlacementProblem) -> Assignment:
    """A feasible assignment [L, E]: contiguous in the layers where that keeps the cap, else spread by load.

    With an anchor it is that, with as few swaps as bring it under the cap; replicas are dealt out one after
    the other, and swapped from there.

    Raises InputError if none is found under the cap: it names the layer that is hardest to balance and the
    smallest imbalance that can be had there, which as a cap for all layers then works.
    """
    if problem.anchor is not None:
        return _start_at_anchor(problem, problem.anchor)
    if problem.has_replicas:
        return _spread_replicas(problem)
    assignment = contiguous(*problem.shape)
    loads, mean_load = problem.load, problem.load.sum(axis=1) / problem.num_parts
    for layer, max_load in enumerate(problem.max_load):
        assignment[layer] = spread(loads[layer], problem.num_parts, max_load)

    busiest = problem.part_loads(assignment).max(axis=1)
    proven: set[int] = set()
    while len(over := np.flatnonzero(busiest > problem.max_load)):
        worst = int(over[np.argmax(busiest[over] / mean_load[over])])
        if worst in proven:
            raise _cannot_keep(problem.max_load[worst], busiest[worst], mean_load[worst], worst)
        proven.add(worst)
        assignment[worst] = _spread_exactly(loads[worst], problem.num_parts, assignment[worst])
        busiest[worst] = part_loads(loads[worst], assignment[worst], problem.num_parts).max()
    return assignment


def _start_at_anchor(problem: PlacementProblem, anchor: Assignment) -> Assignment:
    layers = zip(problem.load, anchor, problem.max_load, strict=True)
    start = np.stack([level(load, parts, problem.num_parts, max_load) for load, parts, max_load in layers])
    busiest = problem.part_loads(start).max(axis=1)
    if (busiest > problem.max_load).any() or not problem.keeps_replicas_apart(start):
        raise InputError(
            "max imbalance cannot be kept from the plan in use by single swaps; place anew instead"
        )
    if not problem.is_feasible(start):
        raise InputError(
            f"max moves {problem.max_moves}: to keep the max imbalance {problem.moves(start)} experts have "
            "to move; allow as many, or a larger imbalance"
        )
    return start


def _spread_replicas(problem: PlacementProblem) -> Assignment:
    """Items dealt out in turn, so that those of one expert, which follow each other, are on different parts.

    In layers over the cap they are then swapped for balance alone.
    """
    num_layers, num_experts, num_parts = problem.shape
    assignment = np.tile(np.arange(num_experts) % num_parts, (num_layers, 1))
    over = problem.part_loads(assignment).max(axis=1) > problem.max_load
    if over.any():
        level_only = PlacementProblem(
            inter=np.zeros_like(problem.inter),
            intra=np.zeros_like(problem.intra),
            load=problem.load,
            num_parts=num_parts,
            balance_price=1 / problem.load.sum(axis=1),
            replica_of=problem.replica_ids,
        )
        prices, now, rng = fixed(level_only), state(level_only, assignment), np.random.default_rng(0)
        for temperature in np.geomspace(0.1 / num_parts, 1e-4 / num_parts, _LEVELS):
            try_swaps(prices, now, temperature, _RANDOM_STARTS, rng)
        assignment[over] = now.assignment[over]
    busiest, mean_load = problem.part_loads(assignment).max(axis=1), problem.load.sum(axis=1) / num_parts
    if (busiest > problem.max_load).any():
        worst = int(np.argmax(np.where(busiest > problem.max_load, busiest / mean_load, 0)))
        raise _cannot_keep(problem.max_load[worst], busiest[worst], mean_load[worst], worst)
    return assignment


def start_inside(problem: PlacementProblem, node: Assignment, flat: Assignment) -> Assignment:
    """A feasible assignment [L, E] to GPUs that follows `node` [L, E], each expert's node, where it can.

    Nodes under their cap can hold experts that no split over their GPUs keeps under the GPUs' cap. In such a
    layer experts are swapped between any GPUs, the busiest first, until all are under it; failing that the
    layer is taken from `flat` [L, E], a feasible assignment to GPUs.
    """
    per_node = problem.num_parts // (int(node.max()) + 1)
    assignment = flat.copy()
    for layer, (load, max_load) in enumerate(zip(problem.load, problem.max_load, strict=True)):
        parts = np.empty_like(flat[layer])
        for index in range(problem.num_parts // per_node):
            experts = np.flatnonzero(node[layer] == index)
            parts[experts] = index * per_node + spread(load[experts], per_node, max_load)
        parts = level(load, parts, problem.num_parts, max_load)
        if part_loads(load, parts, problem.num_parts).max() <= max_load:
            assignment[layer] = parts
    return assignment


def spread(load: Prices, num_parts: int, max_load: float) -> Parts:
    """Parts for the experts of one layer: the first found with no part over `max_load`, else the most level.

    load [E]; each part gets E / num_parts experts. Tried: contiguous as it is, then swaps from the classical
    largest-first rule and from random orders. The same arguments give the same parts.
    """
    best: Parts = contiguous(1, len(load), num_parts)[0]
    least = math.inf
    for index, parts in enumerate(_first_parts(load, num_parts)):
        candidate = parts if index == 0 else level(load, parts, num_parts, max_load)
        busiest = part_loads(load, candidate, num_parts).max()
        if busiest < least:
            best, least = candidate, busiest
        if least <= max_load:
            break
    return best


def level(load: Prices, parts: Parts, num_parts: int, max_load: float) -> Parts:
    """Swap an expert of the busiest part for a lighter one, best swap first, to `max_load` if it goes."""
    parts = parts.copy()
    while (held := part_loads(load, parts, num_parts)).max() > max_load:
        busiest = int(held.argmax())
        inside, outside = np.flatnonzero(parts == busiest), np.flatnonzero(parts != busiest)
        less = load[inside, None] - load[outside]
        higher = np.maximum(held[busiest] - less, held[parts[outside]] + less)
        if higher.size == 0 or higher.min() >= held[busiest] * (1 - 1e-12):  # less is rounding
            break
        x, y = np.unravel_index(higher.argmin(), higher.shape)
        parts[inside[x]], parts[outside[y]] = parts[outside[y]], busiest
    return parts


def part_loads(load: Prices, parts: Parts, num_parts: int) -> Prices:
    """[G]: the load of every part in one layer."""
    return np.asarray(np.bincount(parts, load, num_parts), dtype=np.float64)


def _first_parts(load: Prices, num_parts: int) -> Iterator[Parts]:
    """Contiguous, largest-first, then random orders."""
    ordered = contiguous(1, len(load), num_parts)[0]
    yield ordered
    yield _largest_first(load, num_parts)
    rng = np.random.default_rng(0)
    for _ in range(_RANDOM_STARTS):
        yield rng.permutation(ordered)


def _largest_first(load: Prices, num_parts: int) -> Parts:
    """The heaviest expert left goes to the lightest part with room (Graham's rule, equal counts)."""
    parts = np.empty(len(load), dtype=np.int64)
    held, room = np.zeros(num_parts), np.full(num_parts, len(load) // num_parts)
    for expert in np.argsort(-load, kind="stable"):
        part = int(np.where(room > 0, held, np.inf).argmin())
        parts[expert] = part
        held[part] += load[expert]
        room[part] -= 1
    return parts


def _spread_exactly(load: Prices, num_parts: int, parts: Parts) -> Parts:
    """The most level parts of one layer by an integer program; `parts` [E] where it finds none better."""
    shape = (len(load), num_parts)
    if math.prod(shape) > _MAX_PROGRAM or not load.any():
        return parts
    expert, part = np.indices(shape).reshape(2, -1)
    on_expert = (expert == np.arange(len(load))[:, None]).astype(float)
    on_part = (part == np.arange(num_parts)[:, None]).astype(float)
    share = load / load.sum() * num_parts  # the mean part holds 1; the last variable is the busiest part's

    def wide(rows: Prices, busiest: float) -> Prices:
        return np.hstack([rows, np.full((len(rows), 1), busiest)])

    upper = np.append(np.where((expert == share.argmax()) & (part > 0), 0.0, 1.0), np.inf)  # parts are alike
    result = milp(
        c=np.append(np.zeros(expert.size), 1.0),
        integrality=np.append(np.ones(expert.size), 0),
        bounds=Bounds(np.append(np.zeros(expert.size), 1.0), upper),
        constraints=[
            LinearConstraint(wide(on_expert, 0), 1, 1),
            LinearConstraint(wide(on_part, 0), len(load) // num_parts, len(load) // num_parts),
            LinearConstraint(wide(on_part * share[expert], -1), -np.inf, 0),
        ],
        options={"node_limit": _PROGRAM_NODES, "time_limit": _PROGRAM_SECONDS, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return parts
    found = result.x[:-1].reshape(shape).argmax(axis=1)
    candidates: list[Parts] = [parts, level(load, found, num_parts, 0)]
    return min(candidates, key=lambda parts: float(part_loads(load, parts, num_parts).max()))


def _cannot_keep(max_load: float, busiest: float, mean_load: float, layer: int) -> InputError:
    least = math.ceil(busiest / mean_load * 1e4) / 1e4
    least = least if least >= busiest / mean_load else least + 1e-4
    return InputError(
        f"max imbalance {max_load / mean_load:g} cannot be kept: the least found for MoE layer {layer} is "
        f"{least:.4f} times the mean load; choose {least:.4f} or more"
    )
