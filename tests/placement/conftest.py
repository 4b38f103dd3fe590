"""Small placement problems that the solvers' tests share, and the trace of the golden placement files."""

from collections.abc import Callable

import numpy as np
import pytest

from exflow.placement.solve.problem import PlacementProblem
from exflow.profiling.trace import RoutingTrace


def _random_problem(
    shape: tuple[int, int, int],
    seed: int = 0,
    *,
    inter: bool = True,
    intra: bool = True,
    load: bool = False,
    balance_price: float = 0,
    distance: str | None = None,
    replicas: bool = False,
    anchor: int | None = None,
) -> PlacementProblem:
    """Whole-number prices from 0 to 9 (so that costs compare exactly), a third of them zero.

    load           whole loads from 1 to 29 instead of equal ones; a balance price brings them too
    balance_price  of every layer; costs are then no whole numbers
    distance       "nodes": 1 inside each of two nodes, 3 between them; "metric": whole numbers from 2 to 4
    replicas       neighbouring experts are replicas of one, at times, and alike; and there is a constant
    anchor         a random placement, of which so many experts may move
    """
    num_layers, num_experts, num_parts = shape
    rng = np.random.default_rng(seed)

    def prices(layers: int) -> np.ndarray:
        values = rng.integers(-4, 10, (layers, num_experts, num_experts))
        return np.maximum(values, 0).astype(np.float64)

    within = np.triu(prices(num_layers), 1)
    between = prices(num_layers - 1) * inter
    loads = np.ones((num_layers, num_experts))
    if load or balance_price:
        loads = rng.integers(1, 30, (num_layers, num_experts)).astype(np.float64)
    replica_of = None
    if replicas:
        replica_of = _replica_of(num_layers, num_experts, num_parts, rng)
        layer, item = np.arange(num_layers)[:, None], replica_of
        between = between[layer[:-1, :, None], item[:-1, :, None], item[1:, None, :]]
        within = np.triu(within[layer[:, :, None], item[:, :, None], item[:, None, :]], 1)
        loads = loads[layer, item]
    dealt = np.tile(np.arange(num_experts) % num_parts, (num_layers, 1))
    return PlacementProblem(
        inter=between,
        intra=(within + within.transpose(0, 2, 1)) * intra,
        load=loads,
        num_parts=num_parts,
        balance_price=np.array([balance_price], dtype=np.float64),
        distance=_distance(distance, num_parts, rng),
        replica_of=replica_of,
        constant=-7.0 if replicas else 0.0,
        anchor=None if anchor is None else np.stack([rng.permutation(num_parts)[row] for row in dealt]),
        max_moves=anchor,
    )


def _distance(kind: str | None, num_parts: int, rng: np.random.Generator) -> np.ndarray | None:
    match kind:
        case "nodes":
            node = np.arange(num_parts) * 2 // num_parts
            distance = np.where(node[:, None] == node, 1.0, 3.0)
        case "metric":
            upper = np.triu(rng.integers(2, 5, (num_parts, num_parts)), 1)
            distance = (upper + upper.T).astype(np.float64)
        case _:
            return None
    np.fill_diagonal(distance, 0)
    return distance


def _replica_of(num_layers: int, num_experts: int, num_parts: int, rng: np.random.Generator) -> np.ndarray:
    """[L, E]: runs of one to `num_parts` equal numbers, so that dealing them out in turn keeps them apart."""
    rows = []
    for _ in range(num_layers):
        lengths = rng.integers(1, num_parts + 1, num_experts)
        rows.append(np.repeat(np.arange(num_experts), lengths)[:num_experts])
    return np.stack(rows)


@pytest.fixture(scope="session")
def random_problem() -> Callable[..., PlacementProblem]:
    return _random_problem


@pytest.fixture(scope="session")
def golden_trace() -> RoutingTrace:
    """A trace of the model of the golden files."""
    experts = np.random.default_rng(0).integers(0, 4, (40, 2, 2))
    return RoutingTrace.from_arrays(
        experts,
        num_experts=4,
        moe_layer_ids=[1, 3],
        num_hidden_layers=4,
        model="tiny",
        sequence=np.arange(40) // 8,
    )
