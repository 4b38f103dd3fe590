"""Counts how often a trace chooses each expert."""

import numpy as np
import numpy.typing as npt

from exflow.profiling.trace import RoutingTrace


def expert_load(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """[L, E] int64: the tokens that choose each expert."""
    layers = range(trace.num_layers)
    return np.stack(
        [np.bincount(trace.experts[:, layer].ravel(), minlength=trace.num_experts) for layer in layers]
    )
