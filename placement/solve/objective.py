"""Turns counts into prices: messages of a strategy as sums over pairs of experts, and imbalance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exflow.errors import InputError
from exflow.placement.counts.affinity import AffinityCounts
from exflow.placement.plan.strategy import OWNED, Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.problem import PlacementProblem, Prices

# By default a plan pays up to this many messages per token and layer for one unit of imbalance: enough to
# choose the more level one of plans that are about equal, and to keep a hot layer from being stacked on one
# rank.
BALANCE_PRICE = 0.3


@dataclass(frozen=True)
class Objective:
    """The quantities that a plan minimises. Raises InputError on values that make no sense.

    strategy       whose messages count
    balance_price  messages per token and layer that a unit of imbalance (busiest load / mean load) costs
    max_imbalance  the most that the imbalance of any layer may be; None is free
    owner_price    the same as balance_price for the tokens that a rank owns (see `balance_owners`); at 0 a
                   token's next owner is chosen for fewest messages alone
    """

    strategy: Strategy = Strategy.COHERENT
    balance_price: float = BALANCE_PRICE
    max_imbalance: float | None = None
    owner_price: float = 0.0

    def __post_init__(self) -> None:
        if self.strategy not in OWNED:
            raise InputError(f"strategy {str(self.strategy)!r} is unknown; choose one of {', '.join(OWNED)}")
        object.__setattr__(self, "strategy", Strategy(self.strategy))
        if not 0 <= self.balance_price < math.inf:
            raise InputError(f"balance price is {self.balance_price}; choose a number from 0 up")
        if not 0 <= self.owner_price < math.inf:
            raise InputError(f"owner price is {self.owner_price}; choose a number from 0 up")
        if self.max_imbalance is not None and not 1 <= self.max_imbalance < math.inf:
            raise InputError(
                f"max imbalance is {self.max_imbalance}; it is the busiest rank's load over the mean load: "
                "choose 1 or more"
            )


def make_problem(
    counts: Sequence[AffinityCounts],
    weights: Sequence[float],
    topology: Topology,
    objective: Objective,
    replicas: NDArray[np.int64],
) -> PlacementProblem:
    """The problem whose cost estimates the messages of a token in all layers, and what its imbalance costs.

    counts    of one or several traces of one model, each of which counts by its weight (positive), whatever
              its length
    replicas  [L, E]: how many of each expert there are, 0 for one that a layer lacks; rows with equal sums

    Under coherence a token whose k experts of layer l live on the ranks G_l, and whose owner is o, sends
    |G_l \\ {o}| messages to them and gets |G_l| - 1 back: 2 (|G_l| - 1) + [o not in G_l]. Both terms depend
    on whole sets; they are replaced by sums over pairs that agree with them at the two ends.

    - m experts of a token on one part save m - 1 of the k possible members of G_l and make m (m-1) / 2 pairs
      that stay together. Crediting each such pair with 2/k gives m (m-1) / k <= m - 1, with equality at m = 1
      and m = k. Hence |G_l| - 1 <= 2/k * (pairs of co-selected experts apart), and the price of a co-selected
      pair is 2 * 2/k = 4/k. (k = 2: exact. k = 1: no pairs.)
    - The owner hosts one of the k experts of the layer before, taken as any of them alike. If m experts of
      this layer live on its part, [o in G_l] >= m/k, with equality at m = 0 and m = k. Hence the price of
      expert e of layer l and f of layer l+1, averaged over the k owners, is 1/k^2.

    So the cost is zero exactly when no token leaves its part. For top_k = 1 it is the expected number of
    crossings per token (ExFlow, Yao et al. 2024, the integer program's objective), and `intra` is zero. The
    owner's rule does better than chance, which only widens the inequality.

    Where only a node coheres, the owner can be where the layer before left it just in the home's node, one of
    N: the inter price falls to 1/N of that. Under dispatch-combine it is zero, since every token starts at
    home, and home is one of the k ranks' hosts by chance alone: 2 (1 - 1/G) |G_l| messages, from
    co-activation alone.

    Each of n replicas of an expert has 1/n of its tokens. A token leaves a replica of e for f unless a
    replica of f is there; replicas of f share no part, so the sum over pairs of replicas, each at price / n,
    counts that exactly where all distances are 1, but for a constant. Inside a layer the mean of both
    directions is taken.

    Raises InputError if the traces hold no tokens, or the items cannot be spread evenly.
    """
    if any(each.num_tokens < 1 for each in counts):
        raise InputError("the trace holds no tokens; record some before placing")
    share = np.array(weights) / sum(weights) / [each.num_tokens for each in counts]
    top_k, ranks = counts[0].top_k, topology.num_ranks
    inter_price, intra_price = 1 / top_k**2, 4 / top_k
    if objective.strategy == Strategy.NODE_COHERENT:
        inter_price /= topology.num_nodes
    elif objective.strategy == Strategy.DISPATCH_COMBINE:
        inter_price, intra_price = 0.0, intra_price * (1 - 1 / ranks)
    inter = _weighted(share * inter_price, [each.inter for each in counts])
    intra = _weighted(share * intra_price, [each.intra for each in counts])
    load = _load(counts, share)
    mean_load = load.sum(axis=1) / ranks
    problem = PlacementProblem(
        inter=inter,
        intra=intra,
        load=load,
        num_parts=1,
        max_load=_load_cap(mean_load, objective.max_imbalance),
        balance_price=objective.balance_price / mean_load,
    )
    if (replicas != 1).any():
        problem = _with_replicas(problem, replicas, ranks)
    return replace(problem, num_parts=ranks, distance=topology.distance)


def items_of(replicas: NDArray[np.int64]) -> NDArray[np.int64]:
    """[L, P]: the expert that each item is a replica of, from the numbers of replicas [L, E]."""
    experts = np.arange(replicas.shape[1])
    return np.stack([np.repeat(experts, row) for row in replicas])


def _with_replicas(problem: PlacementProblem, replicas: NDArray[np.int64], most: int) -> PlacementProblem:
    """The problem among items, of which expert e of layer l has `replicas[l, e]`, on `most` ranks at most."""
    item = items_of(replicas)
    hosts = np.minimum(replicas, most)
    layer = np.arange(len(item))[:, None]
    share = 1 / hosts[layer, item]
    nth = np.arange(item.shape[1]) - (np.cumsum(replicas, axis=1) - replicas)[layer, item]
    idle = nth >= most  # every rank has one already: a further one gets no tokens and may be anywhere
    share[idle] = 0
    extra = np.maximum(hosts - 1, 0)
    inter = problem.inter[layer[:-1, :, None], item[:-1, :, None], item[1:, None, :]]
    intra = problem.intra[layer[:, :, None], item[:, :, None], item[:, None, :]]
    return replace(
        problem,
        inter=inter * share[:-1, :, None] * ~idle[1:, None, :],
        intra=intra * (share[:, :, None] + share[:, None, :]) / 2 * ~idle[:, :, None] * ~idle[:, None, :],
        load=problem.load[layer, item] * share,
        replica_of=np.where(idle, replicas.shape[1] + np.arange(item.shape[1]), item),
        constant=-float(
            np.einsum("lef,lf->", problem.inter, extra[1:]) + np.einsum("lef,lf->", problem.intra, extra) / 2
        ),
    )


def _weighted(weights: NDArray[np.float64], arrays: Sequence[NDArray[np.int64]]) -> Prices:
    total = weights[0] * arrays[0]
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total += weight * array
    return np.asarray(total)


def _load(counts: Sequence[AffinityCounts], share: Prices) -> Prices:
    """[L, E] in (token, choice) pairs of the longest trace. Of one trace they are whole: their sums are
    exact, and a cap on them means what `evaluate` reports."""
    if len(counts) == 1:
        return counts[0].load.astype(np.float64)
    return _weighted(share * max(each.num_tokens for each in counts), [each.load for each in counts])


def _load_cap(mean_load: Prices, max_imbalance: float | None) -> Prices:
    """[L]: the largest load whose ratio to `mean_load` [L], as a float, is `max_imbalance` at most."""
    if max_imbalance is None:
        return np.full(len(mean_load), np.inf)
    cap = mean_load * max_imbalance
    for _ in range(4):  # the product is within two roundings of it
        above = np.nextafter(cap, np.inf)
        cap = np.where(cap / mean_load > max_imbalance, np.nextafter(cap, 0), cap)
        cap = np.where(above / mean_load <= max_imbalance, above, cap)
    return np.asarray(cap)
