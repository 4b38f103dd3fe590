"""The large neighbourhood: two parts share out their experts anew, in all layers at once and exactly.

Whatever is on other parts stays apart from both, so the two parts' experts are a problem of their own. With
few experts a part it has few balanced splits a layer (E/G = 4: 70), and Viterbi over them is exact where
swaps and chains of swaps may be stuck.
"""

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np

from exflow.placement.solve.exact import viterbi
from exflow.placement.solve.problem import Assignment, PlacementProblem

_MOST_SPLITS = 252  # of a layer's experts over two parts: 5 on each


def share_out_anew(
    problem: PlacementProblem, assignment: Assignment, stop: Callable[[], bool] = lambda: False
) -> Assignment:
    """The assignment [L, E] after exact steps on pairs of parts, until none lowers the cost; feasible if it
    was.

    `stop` is asked between steps and ends it early. Where the steps do not apply (unequal distances,
    replicas, an anchor, many experts a part) the assignment is returned as it is.
    """
    splits = comb(2 * problem.experts_per_part, problem.experts_per_part)
    if not problem.is_plain or splits > _MOST_SPLITS or problem.num_parts < 3:
        return assignment
    cost, improved = problem.cost(assignment), True
    while improved:
        improved = False
        for pair in combinations(range(problem.num_parts), 2):
            if stop():
                return assignment
            candidate = _split_again(problem, assignment, np.array(pair))
            if (candidate_cost := problem.cost(candidate)) < cost - 1e-12 * abs(cost):
                assignment, cost, improved = candidate, candidate_cost, True
    return assignment


def _split_again(problem: PlacementProblem, assignment: Assignment, pair: Assignment) -> Assignment:
    """The best split of the experts on the two parts; imbalance is priced as if no others were there."""
    experts = np.stack([np.flatnonzero(np.isin(row, pair)) for row in assignment])
    split = viterbi(problem.restricted(experts, pair))
    result = assignment.copy()
    np.put_along_axis(result, experts, pair[split], axis=1)
    return result
