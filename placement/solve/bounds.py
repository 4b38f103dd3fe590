"""A lower bound on the cost of every balanced assignment, cheap enough to state with every plan.

Layers and layer pairs are taken apart, and of "the same part" only a degree is kept: an expert shares its
part with at most E/G experts of the next layer and E/G - 1 of its own. What is left is a b-matching per layer
(pair), bounded from above by Lagrangian duality: any multipliers give a valid bound, good ones a tight one.
A cap on the load is ignored: the bound stays valid, for feasible assignments are balanced ones.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from exflow.placement.solve.problem import Assignment, PlacementProblem, Prices
from exflow.placement.solve.spectral import most_kept_together

_STEPS = 50  # of the subgradient descent; twice as many gain a per cent at most
_MOST_WORK = 5 * 10**7  # entries looked at; half the steps cost another per cent of the bound


def lower_bound(
    problem: PlacementProblem, known: Assignment | None = None, stop: Callable[[], bool] = lambda: False
) -> float:
    """A cost of separation that no balanced assignment is below; >= 0, in the unit of the prices at distance
    1.

    With a `known` assignment [L, E] the spectral bound is tried too, which takes seconds. It sees that an
    expert together with two others keeps these together as well. It ends when it proves the known assignment
    optimal, when it gains little, or when `stop` says so.

    Where every layer pair can reach its own optimum (E == G), the bound comes close to the optimum. Otherwise
    the distance to it is the price of making the layers agree, and no sign of a bad assignment.
    """
    others = problem.intra.copy()
    others[:, np.arange(problem.num_experts), np.arange(problem.num_experts)] = -np.inf
    total_inter, total_intra = problem.inter.sum(), problem.intra.sum() / 2
    apart_inter = total_inter - most_kept(problem.inter, problem.experts_per_part, stop)
    apart_intra = total_intra - most_kept(others, problem.experts_per_part - 1, stop) / 2
    rounding = 1e-12 * (total_inter + total_intra)
    apart = apart_inter + apart_intra
    if known is not None:
        total = total_inter + total_intra
        plain = replace(problem, distance=None, balance_price=np.zeros(1), constant=0.0)
        kept = total - plain.cost(known)
        apart = max(apart, total - most_kept_together(problem, kept + rounding, stop))
    return max(0.0, float(apart - rounding))


def most_kept(prices: Prices, degree: int, stop: Callable[[], bool] = lambda: False) -> float:
    """An upper bound on the largest sum of entries of each matrix [N, E, E] with `degree` a row and a column.

    For any column prices v [N, E] a choice of entries is worth degree * sum(v) plus the sum of its
    entries of `prices - v`, hence at most degree * sum(v) plus, per row, the `degree` largest of those. A
    subgradient descent lowers this bound: a column chosen too often gets dearer. It starts at v = 0, the sum
    of the rows' largest entries; there it ends where `stop` says so.
    """
    steps = max(10, min(_STEPS, _MOST_WORK // max(prices.size, 1)))
    if not degree:
        return 0.0
    return sum((_most_kept(matrix, degree, 1 if stop() else steps) for matrix in prices), 0.0)


def _most_kept(prices: Prices, degree: int, steps: int) -> float:
    column_price = np.zeros(len(prices))
    least = np.inf
    for step in range(steps):
        reduced = prices - column_price
        chosen = np.argpartition(reduced, -degree, axis=1)[:, -degree:]
        bound = np.take_along_axis(reduced, chosen, axis=1).sum() + degree * column_price.sum()
        least = min(least, bound)
        excess = np.bincount(chosen.ravel(), minlength=len(prices)) - degree
        if not excess.any():  # each column chosen `degree` times: the bound is attained
            break
        column_price += 0.3 * 0.88**step * least * excess / (excess @ excess)
    return float(least)
