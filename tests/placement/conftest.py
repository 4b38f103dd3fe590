"""Small placement problems that the solvers' tests share. The fixture is a factory."""

from collections.abc import Callable

import numpy as np
import pytest

from exflow.placement.problem import PlacementProblem


def _random_problem(
    shape: tuple[int, int, int], seed: int = 0, *, inter: bool = True, intra: bool = True
) -> PlacementProblem:
    """Whole-number prices from 0 to 9 (so that costs compare exactly), a third of them zero."""
    num_layers, num_experts, num_parts = shape
    rng = np.random.default_rng(seed)

    def prices(layers: int) -> np.ndarray:
        values = rng.integers(-4, 10, (layers, num_experts, num_experts))
        return np.maximum(values, 0).astype(np.float64)

    within = np.triu(prices(num_layers), 1)
    return PlacementProblem(
        inter=prices(num_layers - 1) * inter,
        intra=(within + within.transpose(0, 2, 1)) * intra,
        load=np.ones((num_layers, num_experts)),
        num_parts=num_parts,
    )


@pytest.fixture(scope="session")
def random_problem() -> Callable[..., PlacementProblem]:
    return _random_problem
