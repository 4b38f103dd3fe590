"""An upper bound on what any assignment keeps together, from the doubly nonnegative relaxation of graph
partitioning.

A *window* is k = 2 adjacent layers (or the only one). X in {0, 1}^{kE x G} tells its experts' parts, M
[kE, kE] is the symmetric matrix of their prices, and the prices kept together are <M, Y> / 2 with Y = X X'.
A layer's own prices are shared by the two windows that it is in. Of Y is used:

- *spectrum*: the rows of its k x k blocks sum to S = E/G, so that Y = 1/G + Z with Z orthogonal to the
  layers' all-ones vectors; the columns of X / sqrt(k S) are orthonormal, so that Z has the eigenvalue k S,
  G - 1 times, and else 0;
- *entries*: Y >= 0, its diagonal is 1, and two windows agree on the layer that they share.

With the second it is as if Y were positive semidefinite over all layers at once (block-tridiagonal patterns
are chordal). Take any multipliers D of the windows with D <= 0 off the diagonal, where windows overlap with
their sum <= 0. Then what is kept is at most the sum of <M - D, Y> / 2 + trace(D) / 2, and <M - D, Y> is at
most what the spectrum allows, a sum of the G - 1 largest eigenvalues (Donath and Hoffman 1973; Zhao, Karisch,
Rendl and Wolkowicz 1998).

ADMM finds good D: it projects on the spectrum and on the entries in turn, D collects by how much they differ
(Wen, Goldfarb and Yin 2010). It may be as inexact as it likes, in single precision and with too few
eigenvectors: the bound is evaluated at the end, in double precision, and holds for any D.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from exflow.placement.solve.problem import PlacementProblem, Prices

Single = NDArray[np.float32]
Matrix = TypeVar("Matrix", Single, Prices)

_MOST_STEPS, _ENOUGH_STEPS, _FEWEST_STEPS = 60, 20, 5
_USUAL_WORK = 2 * 10**7  # of about 0.1 microseconds of one core ...
_MOST_WORK = 55 * 10**6  # ... or this much, where enough steps need more
_CHECK_EVERY = 10  # steps; a check costs about as much as one
_PENALTY = 1.5, 0.6  # times sqrt(G) root mean square prices; the latter where steps are fewer than ...
_FEW = 12
_LARGE_PART = 32  # experts; with smaller ones, few steps do not get as far as the b-matching
_RELAXATION = 1.8
_SPARE = 4  # eigenvectors asked for beyond those of last time


def most_kept_together(
    problem: PlacementProblem, enough: float = 0.0, stop: Callable[[], bool] = lambda: False
) -> float:
    """An upper bound on the prices that a balanced assignment keeps together; infinity where it would take
    too long.

    It ends early at `enough`, when it gains little, or when `stop` says so. Deterministic but for `stop`: the
    steps are counted, not timed.
    """
    num_layers, num_experts, num_parts = problem.shape
    total = float(problem.inter.sum() + problem.intra.sum() / 2)
    if num_parts == 1 or total == 0:
        return total
    size = min(2, num_layers) * num_experts
    work = max(1, num_layers - 1) * (size**2 // 2 + 10 * size * num_parts + 3000)  # as measured
    steps = min(_MOST_STEPS, max(_USUAL_WORK // work, min(_ENOUGH_STEPS, _MOST_WORK // work)))
    if steps < _FEWEST_STEPS or (steps < _FEW and problem.experts_per_part < _LARGE_PART):
        return np.inf
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return _descend(windows(problem), num_parts, steps, enough, stop, pool)


def windows(problem: PlacementProblem) -> Prices:
    """[W, k, E, k, E]: the symmetric prices of the pairs of adjacent layers, or of the only layer."""
    num_layers, num_experts, _ = problem.shape
    if num_layers == 1:
        return problem.intra[:, None, :, None, :].copy()
    shared = problem.intra / 2
    shared[[0, -1]] *= 2  # a layer at an end is in one window alone
    prices = np.empty((num_layers - 1, 2, num_experts, 2, num_experts))
    prices[:, 0, :, 0], prices[:, 1, :, 1] = shared[:-1], shared[1:]
    prices[:, 0, :, 1], prices[:, 1, :, 0] = problem.inter, problem.inter.transpose(0, 2, 1)
    return prices


def _descend(
    prices: Prices, num_parts: int, steps: int, enough: float, stop: Callable[[], bool], pool: Executor
) -> float:
    """The least bound of some steps of ADMM on the windows' prices; D is `unit` times `differ`."""
    unit = _PENALTY[steps < _FEW] * float(np.sqrt(num_parts * np.square(prices).mean()))
    pull = (prices / unit).astype(np.float32)
    entries, differ = _allowed(np.full_like(pull, 1 / num_parts)), np.zeros_like(pull)
    rank = 3 * num_parts
    least = np.inf
    for step in range(1, steps + 1):
        spectral, rank = _onto_spectrum(entries - differ + pull, num_parts, rank + _SPARE, pool)
        differ += _RELAXATION * spectral + (1 - _RELAXATION) * entries
        entries = _allowed(differ.copy())
        differ -= entries
        last = step == steps or stop()
        if last or step % _CHECK_EVERY == 0:
            bound = certified(prices, unit, differ, num_parts, pool)
            gained, least = least - bound, min(least, bound)
            if last or least <= enough or gained < 1e-4 * (prices.sum() / 2 - least):
                break
    return least


def _allowed(entries: Single) -> Single:
    """The nearest matrices [W, k, E, k, E] that agree where windows overlap, are >= 0, and 1 on the
    diagonal; in place."""
    if len(entries) > 1:
        both = (entries[:-1, 1, :, 1] + entries[1:, 0, :, 0]) / 2
        entries[:-1, 1, :, 1] = entries[1:, 0, :, 0] = both
    np.maximum(entries, 0, out=entries)
    np.einsum("wkeke->wke", entries)[:] = 1
    return entries


def _onto_spectrum(matrices: Single, num_parts: int, rank: int, pool: Executor) -> tuple[Single, int]:
    """Near the nearest matrices [W, k, E, k, E] with the spectrum of an assignment's, and their largest rank.

    Near, because only the `rank` largest eigenvalues are looked at; some less where LAPACK finds fewer, as it
    may if the smallest of them are next to equal.
    """
    layers, num_experts = matrices.shape[1:3]
    size = layers * num_experts
    most = size / num_parts
    top = [size - min(rank, size - layers), size - 1]
    found = list(pool.map(lambda matrix: eigh(_centred(matrix), subset_by_index=top), matrices))
    fewest = min(len(value) for value, _ in found)
    vectors = np.stack([vector[:, -fewest:] for _, vector in found])
    values = _clipped(np.stack([value[-fewest:] for value, _ in found]), most, most * (num_parts - 1))
    nearest = (vectors * values[:, None]) @ vectors.transpose(0, 2, 1) + np.float32(1 / num_parts)
    return nearest.reshape(matrices.shape), int((values > 0).sum(axis=1).max())


def _clipped(values: Single, most: float, total: float) -> Single:
    """Each row [W, n] lowered by a number and clipped to 0 ... `most`, so that it sums to `total`."""
    low, high = values.min(axis=1) - most, values.max(axis=1)
    for _ in range(30):
        middle = (low + high) / 2
        more = np.clip(values - middle[:, None], 0, most).sum(axis=1) > total
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return np.asarray(np.clip(values - low[:, None], 0, most), dtype=np.float32)


def _centred(matrix: Matrix) -> Matrix:
    """[kE, kE] from [k, E, k, E]: the matrix on what is orthogonal to the layers' all-ones vectors.

    Those vectors themselves get an eigenvalue below all others.
    """
    inner = matrix - matrix.mean(axis=1, keepdims=True)
    inner -= inner.mean(axis=3, keepdims=True)
    layers, num_experts = inner.shape[:2]
    np.einsum("kekf->kef", inner)[:] -= np.linalg.norm(inner) / num_experts
    flat: Matrix = inner.reshape(layers * num_experts, -1)
    return flat


def certified(prices: Prices, unit: float, differ: Single, num_parts: int, pool: Executor) -> float:
    """The bound that any multipliers `unit * differ` [W, k, E, k, E] prove on what is kept of `prices`."""

    def window(index: int) -> float:
        before = differ[index - 1, 1, :, 1] if index else None
        multiplier = _signed(unit, differ[index], before, index + 1 < len(differ))
        return _bound(prices[index], multiplier, num_parts)

    return sum(pool.map(window, range(len(prices))), 0.0)


def _signed(unit: float, differ: Single, before: Single | None, has_next: bool) -> Prices:
    """A window's multiplier [k, E, k, E] with the signs that the bound asks for.

    The window before says what the layer shared with it may have at most, this one says it to the next.
    """
    multiplier = unit * differ.astype(np.float64)
    ceiling = np.zeros_like(multiplier)
    if before is not None:
        ceiling[0, :, 0] = -unit * before.astype(np.float64)
    if has_next:
        ceiling[1, :, 1] = np.inf
    np.einsum("keke->ke", ceiling)[:] = np.inf  # Y is 1 there: any sign will do
    return np.asarray(np.minimum(multiplier, ceiling))


def _bound(prices: Prices, multiplier: Prices, num_parts: int) -> float:
    """The most that <prices - multiplier, Y> / 2 can be by the spectrum of Y, plus trace(multiplier) / 2.

    LAPACK's eigenvalues are those of a matrix that differs from ours by a small multiple of rounding (2e-16,
    times a slowly growing function of the size); the margin is far above that and the other rounding errors.
    """
    reduced = prices - multiplier
    reduced = (reduced + reduced.transpose(2, 3, 0, 1)) / 2  # Y is symmetric, single precision is not quite
    eigenvalues = np.linalg.eigvalsh(_centred(reduced))
    scale = len(eigenvalues) / num_parts / 2
    margin = 1e-12 * num_parts * float(np.linalg.norm(prices) + np.linalg.norm(multiplier))
    largest = float(eigenvalues[len(eigenvalues) - (num_parts - 1) :].sum())
    by_spectrum = float(reduced.sum()) / num_parts / 2 + scale * (largest + margin)
    return by_spectrum + float(np.einsum("keke->", multiplier)) / 2
