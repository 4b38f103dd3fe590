"""Exact placement where exactness is cheap: one expert a part, or few balanced partitions of a layer.

The cost is a sum over single layers and adjacent layer pairs, so layers form a chain: once layer l is fixed,
the layers after l do not depend on those before l.
"""

from itertools import product
from math import comb, factorial, prod

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from exflow.errors import InputError
from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.problem import Assignment, PlacementProblem, Prices, one_hot, soft_maximum

# The Viterbi pass looks at this many (partition, partition) pairs a layer at most: 16 experts on 2 parts
# (12,870 x 6,435 = 83 million, about half a second a layer) is in, 16 on 4 is far out.
MAX_TRANSITIONS = 10**8
_BLOCK = 2**22  # transitions held in memory at a time: 32 MiB of float64


def solve_exactly(problem: PlacementProblem) -> Assignment:
    """A feasible assignment [L, E] of least cost; there must be one (`start.balanced_start` tells).

    Raises InputError if neither exact method applies.
    """
    if not problem.is_plain:
        raise InputError(
            "method exact: does not know unequal distances, replicas, or a limit on moves; use method search"
        )
    if problem.num_parts == problem.num_experts:
        return chain_of_matchings(problem)
    if count_transitions(problem) > MAX_TRANSITIONS:
        raise InputError(
            f"method exact: {problem.num_experts} experts on {problem.num_parts} parts give "
            f"{count_transitions(problem):.1e} transitions a layer, over the limit of {MAX_TRANSITIONS:.0e}; "
            "use method search"
        )
    return viterbi(problem)


def is_exactly_solvable(problem: PlacementProblem) -> bool:
    """True if `solve_exactly` applies: E == G, or few enough balanced partitions, and parts alike."""
    if not problem.is_plain:
        return False
    return problem.num_parts == problem.num_experts or count_transitions(problem) <= MAX_TRANSITIONS


def count_transitions(problem: PlacementProblem) -> int:
    """Pairs of balanced partitions, one labelled and one not, that a Viterbi step compares."""
    size = problem.experts_per_part
    labelled = prod(comb(unplaced, size) for unplaced in range(problem.num_experts, 0, -size))
    return labelled * (labelled // factorial(problem.num_parts))


def chain_of_matchings(problem: PlacementProblem) -> Assignment:
    """The optimum for one expert a part (E == G), in O(L E^3).

    Within a layer all pairs are apart whatever we do, and relabelling the parts of a whole layer reaches
    every assignment; so each layer is matched to the one before it, independently of the rest. The loads of
    the parts are those of the experts: a cap holds for all assignments or for none.
    """
    assignment = contiguous(*problem.shape)
    for layer, prices in enumerate(problem.inter):
        expert, partner = linear_sum_assignment(prices, maximize=True)
        assignment[layer + 1, partner] = assignment[layer, expert]
    return assignment


def viterbi(problem: PlacementProblem) -> Assignment:
    """The optimum by dynamic programming over the balanced partitions of each layer.

    The names of the parts mean nothing until a neighbour is fixed, so the least cost of the layers up to l
    depends only on layer l's partition, not on its labels. Keeping one labelled *canonical* form per
    partition as the later side of a transition saves a factor of G!. Partitions over the cap drop out.
    """
    partitions = _balanced_partitions(problem.num_experts, problem.num_parts)
    canonical, canonical_of, relabel = _canonical_forms(partitions, problem.num_parts)
    labelled_hot = one_hot(partitions, problem.num_parts)
    canonical_hot = one_hot(canonical, problem.num_parts)
    together = _kept_within(problem.intra, canonical_hot)
    loads = _part_loads(problem.load, canonical_hot)
    together -= problem.balance_price[:, None] * soft_maximum(loads)
    together[loads.max(axis=2) > problem.max_load[:, None]] = -np.inf

    kept = together[0]
    predecessors: list[NDArray[np.int64]] = []
    for prices, kept_within in zip(problem.inter, together[1:], strict=True):
        best, predecessor = _best_predecessors(prices, labelled_hot, canonical_hot, kept[canonical_of])
        kept = best + kept_within
        predecessors.append(predecessor)

    # Walk back. Each predecessor is labelled relative to its successor's canonical form; `name` carries
    # the names that the canonical labels of the current layer have in the assignment.
    state = int(np.argmax(kept))
    assert kept[state] > -np.inf, "no partition of some layer keeps the cap"
    name = np.arange(problem.num_parts)
    layers = [canonical[state]]
    for predecessor in reversed(predecessors):
        labelled = predecessor[state]
        layers.append(name[partitions[labelled]])
        name = name[relabel[labelled]]
        state = canonical_of[labelled]
    return np.stack(layers[::-1])


def brute_force(problem: PlacementProblem) -> Assignment:
    """The optimum by looking at every feasible assignment: the slow reference for a handful of experts."""
    partitions = _balanced_partitions(problem.num_experts, problem.num_parts)
    candidates = product(range(len(partitions)), repeat=problem.num_layers)
    assignments = (partitions[list(choice)] for choice in candidates)
    return min(filter(problem.is_feasible, assignments), key=problem.cost)


def _best_predecessors(
    prices: Prices, labelled_hot: Prices, canonical_hot: Prices, kept_before: Prices
) -> tuple[Prices, NDArray[np.int64]]:
    """Find, for every canonical partition of a layer, the labelled one before it that keeps most together.

    kept[q, p] = sum over parts g of prices[p's experts on g, q's experts on g], one matrix product with the
    one-hot forms; done in blocks of q to bound memory.
    """
    pulled = np.einsum("ef,qfg->qeg", prices, canonical_hot, optimize=True).reshape(len(canonical_hot), -1)
    sources = labelled_hot.reshape(len(labelled_hot), -1).T
    best = np.empty(len(canonical_hot))
    predecessor = np.empty(len(canonical_hot), dtype=np.int64)
    step = max(1, _BLOCK // len(labelled_hot))
    for start in range(0, len(canonical_hot), step):
        block = slice(start, start + step)
        kept = pulled[block] @ sources
        kept += kept_before
        predecessor[block] = kept.argmax(axis=1)
        best[block] = np.take_along_axis(kept, predecessor[block, None], axis=1)[:, 0]
    return best, predecessor


def _kept_within(intra: Prices, hot: Prices) -> Prices:
    """[L, N]: the prices inside each layer that each of the N partitions keeps together."""
    kept: Prices = np.einsum("lef,neg,nfg->ln", intra, hot, hot, optimize=True) / 2
    return kept


def _part_loads(load: Prices, hot: Prices) -> Prices:
    """[L, N, G]: in each layer the load of every part, for each of the N partitions."""
    loads: Prices = np.einsum("le,neg->lng", load, hot, optimize=True)
    return loads


def _balanced_partitions(num_experts: int, num_parts: int) -> NDArray[np.int64]:
    """[N, E]: every way to give each of the parts E / G experts, labels included."""
    rows = np.zeros((1, 0), dtype=np.int64)
    for _ in range(num_experts):
        rows = np.concatenate([np.insert(rows, rows.shape[1], part, axis=1) for part in range(num_parts)])
        sizes = (rows[:, :, None] == np.arange(num_parts)).sum(axis=1)
        rows = rows[sizes.max(axis=1) <= num_experts // num_parts]
    return rows


def _canonical_forms(
    partitions: NDArray[np.int64], num_parts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Split each labelled partition [N, E] into a canonical one [M, E] and the names of its parts [N, G].

    Canonical labels count parts in the order in which they first appear. Returns (canonical, canonical_of,
    relabel) with partitions[n] == relabel[n][canonical[canonical_of[n]]].
    """
    first_seen = (partitions[:, :, None] == np.arange(num_parts)).argmax(axis=1)
    relabel = first_seen.argsort(axis=1)  # canonical label -> label
    rank = relabel.argsort(axis=1)  # label -> canonical label
    canonical, canonical_of = np.unique(
        np.take_along_axis(rank, partitions, axis=1), axis=0, return_inverse=True
    )
    return canonical, canonical_of, relabel
