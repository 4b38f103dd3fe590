"""The placement problem: what it costs to keep two experts on different parts.

A *part* is whatever the experts are spread over: the GPUs, the nodes, or the GPUs inside one node.
Shapes: L MoE layers, E experts a layer (with replicas: E items, each a replica of some expert), G parts. An
*assignment* is an int array [L, E] that gives every expert its part; it is *balanced* when every part holds
E / G experts of every layer, and *feasible* when, besides, no part holds more than the layer's largest
allowed load or two replicas of one expert, and not more experts have moved than may.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from exflow.errors import InputError
from exflow.placement.solve.baselines import contiguous

Assignment = NDArray[np.int64]
Prices = NDArray[np.float64]

# Imbalance is priced by a soft maximum of the parts' loads, their 16-norm. Near balance it is quadratic:
# little is paid for evening out what other tokens will make uneven again. Far from it, it is the maximum.
SQUARINGS = 4
NORM = 2**SQUARINGS


@dataclass(frozen=True, eq=False)
class PlacementProblem:
    """Prices of separating experts and of imbalance; minimise `cost` over the feasible assignments.

    inter          [L-1, E, E] float64 >= 0: what expert e of layer l and f of layer l+1 pay for a distance of
                   1
    intra          [L, E, E] float64 >= 0, symmetric, zero diagonal: the same for experts e and f of one
                   layer, paid once
    load           [L, E] float64 >= 0: work of each expert (any unit)
    num_parts      G >= 1, divides E
    max_load       [L] float64 >= 0: the cap, the most load that a part may hold; infinite where free
    balance_price  [L] float64 >= 0: paid for every unit that `soft_maximum` of the layer's loads is over its
                   least value
    distance       [G, G] float64, symmetric, zero diagonal, else positive; by default 1 between any two parts
    replica_of     [L, E] int: experts of a layer with the same number are replicas of one, and share no part;
                   by default all differ
    constant       part of every cost
    anchor         [L, E] a balanced assignment, and `max_moves`: at most so many experts may be on another
                   part than there; by default all may

    [1] stands for all layers alike where [L] is asked for. Raises InputError where shapes or values break
    these rules.
    """

    inter: Prices
    intra: Prices
    load: Prices
    num_parts: int
    max_load: Prices = field(default_factory=lambda: np.array([np.inf]))
    balance_price: Prices = field(default_factory=lambda: np.array([0.0]))
    distance: Prices | None = None
    replica_of: Assignment | None = None
    constant: float = 0.0
    anchor: Assignment | None = None
    max_moves: int | None = None

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
        for name in ("max_load", "balance_price"):
            _check_per_layer(name, getattr(self, name), num_layers)
            object.__setattr__(self, name, np.broadcast_to(getattr(self, name), num_layers).copy())
        if self.distance is None:
            object.__setattr__(self, "distance", 1 - np.eye(self.num_parts))
        _check_prices("distance", self.distances, (self.num_parts, self.num_parts))
        if (
            not np.array_equal(self.distances, self.distances.T)
            or ((self.distances > 0) != ~np.eye(self.num_parts, dtype=bool)).any()
        ):
            raise InputError("distance: give a symmetric matrix, zero on the diagonal and positive elsewhere")
        if self.replica_of is None:
            object.__setattr__(self, "replica_of", contiguous(num_layers, num_experts, num_experts))
        assert (self.anchor is None) == (self.max_moves is None)
        assert self.anchor is None or self.is_balanced(self.anchor)

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes (L, E, G)."""
        return self.num_layers, self.num_experts, self.num_parts

    @property
    def experts_per_part(self) -> int:
        return self.num_experts // self.num_parts

    @property
    def distances(self) -> Prices:
        """[G, G] float64: distance between two parts; 1 between any two by default."""
        assert self.distance is not None
        return self.distance

    @property
    def replica_ids(self) -> Assignment:
        """[L, E] int: the expert that each item is a replica of."""
        assert self.replica_of is not None
        return self.replica_of

    @cached_property
    def is_uniform(self) -> bool:
        """True if all parts are at distance 1 from each other: their names do not matter."""
        return np.array_equal(self.distances, 1 - np.eye(self.num_parts))

    @cached_property
    def has_replicas(self) -> bool:
        return any(len(np.unique(row)) < len(row) for row in self.replica_ids)

    @property
    def is_plain(self) -> bool:
        """True if parts are alike and each expert stands for itself: what the exact methods know."""
        return self.is_uniform and not self.has_replicas and self.anchor is None

    def cost(self, assignment: Assignment) -> float:
        """The sum of the prices of all pairs that `assignment` [L, E] separates, and of the busiest parts."""
        hot = one_hot(assignment, self.num_parts)
        total = self.constant + self.imbalance_cost(self.part_loads(assignment))
        for layer in range(self.num_layers):
            between_parts = hot[layer].T @ self.intra[layer] @ hot[layer] / 2
            if layer + 1 < self.num_layers:
                between_parts += hot[layer].T @ self.inter[layer] @ hot[layer + 1]
            total += float((between_parts * self.distances).sum())
        return total

    @property
    def least_soft_maximum(self) -> Prices:
        """[L]: the soft maximum of equal loads."""
        return np.asarray(self.load.sum(axis=1) / self.num_parts ** (1 - 1 / NORM))

    def imbalance_cost(self, loads: Prices) -> float:
        """Cost of the parts' loads [L, G]; 0 if all are equal."""
        return float(self.balance_price @ np.maximum(soft_maximum(loads) - self.least_soft_maximum, 0))

    def is_balanced(self, assignment: Assignment) -> bool:
        """True if `assignment` is [L, E] and every part holds E / G experts of every layer."""
        balanced = contiguous(*self.shape)
        return assignment.shape == balanced.shape and np.array_equal(np.sort(assignment), balanced)

    def part_loads(self, assignment: Assignment) -> Prices:
        """[L, G]: the load of every part."""
        loads = np.zeros((self.num_layers, self.num_parts))
        np.add.at(loads, (np.arange(self.num_layers)[:, None], assignment), self.load)
        return loads

    def keeps_replicas_apart(self, assignment: Assignment) -> bool:
        """True if no two replicas of an expert are on one part."""
        if not self.has_replicas:
            return True
        places = np.sort(self.replica_ids * self.num_parts + assignment, axis=1)
        return not (places[:, 1:] == places[:, :-1]).any()

    def moves(self, assignment: Assignment) -> int:
        """The number of experts that are on another part than in the anchor; 0 without one."""
        return 0 if self.anchor is None else int((assignment != self.anchor).sum())

    def is_feasible(self, assignment: Assignment) -> bool:
        """True if `assignment` is balanced and keeps all the limits."""
        rounding = 0.0 if np.array_equal(self.load, np.rint(self.load)) else 1e-9  # of sums in another order
        return (
            self.is_balanced(assignment)
            and bool((self.part_loads(assignment).max(axis=1) <= self.max_load * (1 + rounding)).all())
            and self.keeps_replicas_apart(assignment)
            and (self.max_moves is None or self.moves(assignment) <= self.max_moves)
        )

    def restricted(self, experts: NDArray[np.int64], parts: NDArray[np.int64]) -> "PlacementProblem":
        """The same prices among `experts` [L, n] only (ids, a row a layer), to be spread over `parts` [m]
        only.

        A part may hold as much as before. What is outside costs nothing and stays where it is; there must be
        no anchor.
        """
        layer = np.arange(self.num_layers)[:, None]
        return PlacementProblem(
            inter=self.inter[layer[:-1, :, None], experts[:-1, :, None], experts[1:, None, :]],
            intra=self.intra[layer[:, :, None], experts[:, :, None], experts[:, None, :]],
            load=self.load[layer, experts],
            num_parts=len(parts),
            max_load=self.max_load,
            balance_price=self.balance_price,
            distance=self.distances[np.ix_(parts, parts)],
            replica_of=self.replica_ids[layer, experts],
        )


def soft_maximum(loads: Prices) -> Prices:
    """[...] from [..., G]: the NORM-norm; from the maximum to G ** (1 / NORM) times that."""
    return np.asarray(np.linalg.norm(loads, ord=NORM, axis=-1))


def one_hot(assignment: Assignment, num_parts: int) -> Prices:
    """[..., E, G] float64: 1 where the expert is on the part."""
    return np.asarray(assignment[..., None] == np.arange(num_parts), dtype=np.float64)


def _check_per_layer(name: str, values: Prices, num_layers: int) -> None:
    if values.shape not in ((num_layers,), (1,)):
        raise InputError(f"{name}: shape {values.shape}, expected {(num_layers,)}")
    if values.dtype != np.float64:
        raise InputError(f"{name}: dtype {values.dtype}, expected float64")
    if not (values >= 0).all():
        raise InputError(f"{name}: holds negative values or NaN; give a number from 0 up for each layer")


def _check_prices(name: str, prices: Prices, shape: tuple[int, ...]) -> None:
    if prices.shape != shape:
        raise InputError(f"{name}: shape {prices.shape}, expected {shape}")
    if prices.dtype != np.float64:
        raise InputError(f"{name}: dtype {prices.dtype}, expected float64")
    if not np.isfinite(prices).all() or (prices < 0).any():
        raise InputError(
            f"{name}: holds negative or non-finite values; prices are counts or shares of tokens"
        )
