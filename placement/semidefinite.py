"""An upper bound on what any assignment keeps together, from the semidefinite relaxation of graph
partitioning.

Take k layers. X in {0, 1}^{kE x G} tells each expert's part, M [kE, kE] is the symmetric matrix of their
prices, and the prices kept together are tr(X' M X) / 2. What is used of X: every row has one 1; every part
has S = E/G experts of each layer, so that X / sqrt(k S) has orthonormal columns, whose span contains the
all-ones vector and is orthogonal to every other combination of the layers' indicators; and X X' >= 0. For any
numbers u and any symmetric N >= 0 with a zero diagonal,

    tr(X' M X) <= tr(X' (M + diag(u) + N) X) - sum(u),

and the right-hand side is at most k S times the sum of the G largest eigenvalues allowed by that span, less
sum(u). Minimising over u and N is the dual of the semidefinite relaxation (Donath and Hoffman 1973 for u;
Zhao, Karisch, Rendl and Wolkowicz 1998 for the rest); every step of the descent is a valid bound.

Two adjacent layers at a time: a layer's own prices are shared by the two pairs that it is in, and the bounds
add.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from exflow.placement.problem import Assignment, PlacementProblem, Prices, one_hot

_STEPS = 150  # twice as many take another fifth off the gap
_MOST_WORK = 4 * 10**9  # cubes of matrix sizes, about five seconds of one core ...
_FEWEST_STEPS = 20  # ... and where that is too few to gain on the b-matching, none
_PATIENCE, _SHRINK = 5, 0.7  # without progress for so many steps, shorter ones


@dataclass(frozen=True)
class Window:
    """Layers whose prices are looked at together, and how much a good assignment keeps of them."""

    prices: Prices  # [kE, kE] symmetric
    layers: int
    kept: float


def most_kept_together(
    problem: PlacementProblem, known: Assignment, stop: Callable[[], bool] = lambda: False
) -> float:
    """At least the prices that any balanced assignment keeps together; infinity where it would take too long.

    `known` [L, E] is an assignment, the better the better: it says how far the descent can get, which sets
    the length of its steps. Deterministic: the steps are counted, not timed.
    """
    num_layers, num_experts, num_parts = problem.shape
    windows = max(1, num_layers - 1)
    steps = min(_STEPS, _MOST_WORK // (windows * (min(2, num_layers) * num_experts) ** 3))
    if steps < _FEWEST_STEPS:
        return np.inf
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bounds = pool.map(lambda window: _descend(window, num_parts, steps, stop), _windows(problem, known))
        return float(sum(bounds))


def _windows(problem: PlacementProblem, known: Assignment) -> Iterator[Window]:
    """The pairs of adjacent layers, or the only layer."""
    num_layers, num_experts, num_parts = problem.shape
    hot = one_hot(known, num_parts)
    if num_layers == 1:
        yield _window(problem.intra[0], hot[0], 1)
    for layer in range(num_layers - 1):
        prices = np.zeros((2, num_experts, 2, num_experts))
        for side, end in ((0, 0), (1, num_layers - 1)):  # a layer at an end is in one pair alone
            share = 1.0 if layer + side == end else 0.5
            prices[side, :, side] = share * problem.intra[layer + side]
        prices[0, :, 1] = problem.inter[layer]
        prices[1, :, 0] = problem.inter[layer].T
        yield _window(prices.reshape(2 * num_experts, -1), hot[layer : layer + 2].reshape(-1, num_parts), 2)


def _window(prices: Prices, hot: Prices, layers: int) -> Window:
    return Window(prices, layers, float((hot * (prices @ hot)).sum()) / 2)


def _descend(window: Window, num_parts: int, steps: int, stop: Callable[[], bool]) -> float:
    """The least bound of a projected subgradient descent over u and N, with Polyak's steps to the known."""
    size = len(window.prices)
    diagonal = np.diag_indices(size)
    shift, added = np.zeros(size), np.zeros_like(window.prices)
    least, length, stalled = np.inf, 1.0, 0
    for _ in range(steps):
        matrix = window.prices + added
        matrix[diagonal] += shift
        value, together = _relaxed(matrix, window.layers, num_parts)
        bound = value - shift.sum() / 2
        stalled = 0 if bound < least * (1 - 1e-4) else stalled + 1
        least = min(least, bound)
        if stalled >= _PATIENCE:
            length, stalled = length * _SHRINK, 0
        slope = np.where((added > 0) | (together < 0), together, 0)  # what N >= 0 lets it move
        slope[diagonal] = 0
        slope_shift = together[diagonal] - 0.5
        square = float((slope**2).sum() + (slope_shift**2).sum())
        if square < 1e-18 or bound <= window.kept or stop():
            break
        step = length * (bound - window.kept) / square
        shift = shift - step * slope_shift
        added = np.maximum(added - step * slope, 0)
    return float(least)


def _relaxed(matrix: Prices, layers: int, num_parts: int) -> tuple[float, Prices]:
    """The most that tr(X' matrix X) / 2 can be in the relaxation, and X X' / 2 [kE, kE] where it is.

    LAPACK's eigenvalues are those of a matrix that differs from ours by a small multiple of rounding; the
    margin is far above it.
    """
    size = len(matrix)
    scale = size / num_parts / 2  # k S / 2
    ones = np.kron(np.eye(layers), np.full((size // layers, 1), (size // layers) ** -0.5))
    inner = matrix - ones @ (ones.T @ matrix)
    inner -= (inner @ ones) @ ones.T
    values, vectors = eigh((inner + inner.T) / 2, check_finite=False, driver="evd")
    values, vectors = values[size - num_parts + 1 :], vectors[:, size - num_parts + 1 :]
    margin = 1e-12 * num_parts * float(np.linalg.norm(matrix))
    value = scale * (float(matrix.sum()) / size + float(values.sum()) + margin)
    return value, scale * (vectors @ vectors.T + 1 / size)
