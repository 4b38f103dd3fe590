"""The placement problem: what it costs to keep two experts on different parts.

A *part* is whatever the experts are spread over: the GPUs, the nodes, or the GPUs inside one node.
Shapes: L MoE layers, E experts a layer, G parts. An *assignment* is an int array [L, E] that gives every
expert its part; it is *balanced* when every part holds E / G experts of every layer, and *feasible* when,
besides, no part holds more than the layer's largest allowed load.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from exflow.errors import InputError
from exflow.placement.affinity import AffinityCounts
from exflow.placement.baselines import contiguous

Assignment = NDArray[np.int64]
Prices = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PlacementProblem:
    """Prices of separating experts; minimise `cost` over the feasible assignments.

    inter      [L-1, E, E] float64 >= 0: paid when expert e of layer l and expert f of layer l+1 are on
               different parts
    intra      [L, E, E] float64 >= 0, symmetric, zero diagonal: paid once when experts e and f of one layer
               are on different parts
    load       [L, E] float64 >= 0: work of each expert (any unit; no part of `cost`)
    num_parts  G >= 1, divides E
    max_load   [L] float64 >= 0: the cap, the most load that a part may hold; infinite where free. [1] stands
               for all layers alike; the default is free

    Raises InputError where an array's shape or values, or the number of parts, break these rules.
    """

    inter: Prices
    intra: Prices
    load: Prices
    num_parts: int
    max_load: Prices = field(default_factory=lambda: np.array([np.inf]))

    def __post_init__(self) -> None:
        if self.load.ndim != 2 or self.load.size == 0:
            raise InputError(f"load: shape {self.load.shape}; give [layers, experts], at least one of each")
        num_layers, num_experts = self.load.shape
        _check_prices("load", self.load, (num_layers, num_experts))
        _check_prices("inter", self.inter, (num_layers - 1, num_experts, num_experts))
        _check_prices("intra", self.intra, (num_layers, num_experts, num_experts))
        if not np.array_equal(self.intra, self.intra.transpose(0, 2, 1)):
            raise InputError("intra: not symmetric; give each pair one price, at [e, f] and at [f, e]")
        if np.diagonal(self.intra, axis1=1, axis2=2).any():
            raise InputError("intra: the diagonal is not zero; an expert is never apart from itself")
        if self.num_parts < 1 or num_experts % self.num_parts:
            raise InputError(
                f"{num_experts} experts cannot be spread evenly over {self.num_parts} parts; "
                f"choose a divisor of {num_experts}"
            )
        _check_max_load(self.max_load, num_layers)
        object.__setattr__(self, "max_load", np.broadcast_to(self.max_load, num_layers).copy())

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, E, G)."""
        return self.num_layers, self.num_experts, self.num_parts

    @property
    def experts_per_part(self) -> int:
        return self.num_experts // self.num_parts

    def cost(self, assignment: Assignment) -> float:
        """The sum of the prices of all pairs that `assignment` [L, E] separates."""
        apart_inter = assignment[:-1, :, None] != assignment[1:, None, :]
        apart_intra = assignment[:, :, None] != assignment[:, None, :]
        return float(self.inter[apart_inter].sum() + self.intra[apart_intra].sum() / 2)

    def is_balanced(self, assignment: Assignment) -> bool:
        """True if `assignment` is [L, E] and every part holds E / G experts of every layer."""
        balanced = contiguous(*self.shape)
        return assignment.shape == balanced.shape and np.array_equal(np.sort(assignment), balanced)

    def part_loads(self, assignment: Assignment) -> Prices:
        """[L, G]: the load of every part."""
        loads = np.zeros((self.num_layers, self.num_parts))
        np.add.at(loads, (np.arange(self.num_layers)[:, None], assignment), self.load)
        return loads

    def is_feasible(self, assignment: Assignment) -> bool:
        """True if `assignment` is balanced and no part holds more than `max_load`."""
        if not self.is_balanced(assignment):
            return False
        return bool((self.part_loads(assignment).max(axis=1) <= self.max_load).all())

    def restricted(self, experts: NDArray[np.int64], num_parts: int) -> "PlacementProblem":
        """The same prices among `experts` [L, n] only (ids, a row a layer), to be spread over `num_parts`.

        A part may hold as much as before.
        """
        layer = np.arange(self.num_layers)[:, None]
        return PlacementProblem(
            inter=self.inter[layer[:-1, :, None], experts[:-1, :, None], experts[1:, None, :]],
            intra=self.intra[layer[:, :, None], experts[:, :, None], experts[:, None, :]],
            load=self.load[layer, experts],
            num_parts=num_parts,
            max_load=self.max_load,
        )


def problem_from_counts(
    counts: AffinityCounts, num_parts: int, max_imbalance: float | None = None
) -> PlacementProblem:
    """Prices in messages per token, so that `cost` bounds the coherent messages from above; top-1: exactly.

    Under the coherent strategy a token whose k experts of layer l live on the parts G_l, and whose owner is
    o, sends |G_l \\ {o}| messages to them and gets |G_l| - 1 back: 2 (|G_l| - 1) + [o not in G_l]. Both
    terms depend on whole sets; they are replaced by sums over pairs that agree with them at the two ends.

    - m experts of a token on one part save m - 1 of the k possible members of G_l and make m (m-1) / 2
      pairs that stay together. Crediting each such pair with 2/k gives m (m-1) / k <= m - 1, with equality
      at m = 1 and m = k. Hence |G_l| - 1 <= 2/k * (pairs of co-selected experts apart), and the price of a
      co-selected pair is 2 * 2/k = 4/k. (k = 2: exact. k = 1: no pairs.)
    - The owner hosts one of the k experts of the layer before, taken as any of them alike. If m experts of
      this layer live on its part, [o in G_l] >= m/k, with equality at m = 0 and m = k. Hence the price of
      expert e of layer l and f of layer l+1, averaged over the k owners, is 1/k^2.

    So the cost is zero exactly when no token leaves its part. For top_k = 1 it is the expected number of
    crossings per token (ExFlow, Yao et al. 2024, the integer program's objective), and `intra` is zero.
    The owner's rule does better than chance, which only widens the inequality.

    `max_imbalance` caps, in every layer, the busiest part's load over the parts' mean load; None is free.
    Loads are whole (token, expert) pairs: their sums are exact, and the cap means what `evaluate` reports.

    Raises InputError if the experts cannot be spread evenly over `num_parts`, the trace is empty, or
    `max_imbalance` is no finite number from 1 up.
    """
    if counts.num_tokens < 1:
        raise InputError("the trace holds no tokens; record some before placing")
    pair_price = 1 / counts.top_k**2
    return PlacementProblem(
        inter=counts.inter * pair_price / counts.num_tokens,
        intra=counts.intra * (4 / counts.top_k) / counts.num_tokens,
        load=counts.load.astype(np.float64),
        num_parts=num_parts,
        max_load=_load_cap(counts.load.sum(axis=1) / max(num_parts, 1), max_imbalance),
    )


def _load_cap(mean_load: Prices, max_imbalance: float | None) -> Prices:
    """[L]: the largest load whose ratio to `mean_load` [L], as a float, is `max_imbalance` at most."""
    if max_imbalance is None:
        return np.full(len(mean_load), np.inf)
    if not 1 <= max_imbalance < math.inf:
        raise InputError(
            f"max imbalance is {max_imbalance}; it is the busiest rank's load over the mean load: "
            "choose 1 or more"
        )
    cap = mean_load * max_imbalance
    for _ in range(4):  # the product is within two roundings of it
        above = np.nextafter(cap, np.inf)
        cap = np.where(cap / mean_load > max_imbalance, np.nextafter(cap, 0), cap)
        cap = np.where(above / mean_load <= max_imbalance, above, cap)
    return np.asarray(cap)


def _check_max_load(max_load: Prices, num_layers: int) -> None:
    if max_load.shape not in ((num_layers,), (1,)):
        raise InputError(f"max_load: shape {max_load.shape}, expected {(num_layers,)}")
    if max_load.dtype != np.float64:
        raise InputError(f"max_load: dtype {max_load.dtype}, expected float64")
    if not (max_load >= 0).all():
        raise InputError("max_load: holds negative values or NaN; a cap is a load, infinite where free")


def _check_prices(name: str, prices: Prices, shape: tuple[int, ...]) -> None:
    if prices.shape != shape:
        raise InputError(f"{name}: shape {prices.shape}, expected {shape}")
    if prices.dtype != np.float64:
        raise InputError(f"{name}: dtype {prices.dtype}, expected float64")
    if not np.isfinite(prices).all() or (prices < 0).any():
        raise InputError(
            f"{name}: holds negative or non-finite values; prices are counts or shares of tokens"
        )
