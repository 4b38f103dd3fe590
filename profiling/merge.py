"""Several traces of one model as one, for instance of several domains."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.trace import RoutingTrace


def merge(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """The rows of all traces in order; the sequences of each are numbered on from those before it.

    The model's name is the first one's; gate weights are kept if all have them. Raises InputError where the
    traces are of models with other experts, layers or choices.
    """
    if len(traces) == 1:
        return traces[0]
    first = traces[0]
    for number, trace in enumerate(traces[1:], start=2):
        if replace(trace.layout, model="") != replace(first.layout, model=""):
            raise InputError(
                f"trace 1 is of {_describe(first)}, trace {number} of {_describe(trace)}; "
                "give traces of one model"
            )
    sequences, offset = [], 0
    for trace in traces:
        sequences.append(trace.sequence.astype(np.int64) + offset)
        offset += int(trace.sequence.max(initial=-1)) + 1
    weights = [trace.weights for trace in traces if trace.weights is not None]
    return replace(
        first,
        experts=np.concatenate([trace.experts for trace in traces]),
        sequence=np.concatenate(sequences).astype(np.int32),
        position=np.concatenate([trace.position for trace in traces]),
        phase=np.concatenate([trace.phase for trace in traces]),
        weights=np.concatenate(weights) if len(weights) == len(traces) else None,
    )


def _describe(trace: RoutingTrace) -> str:
    return f"{trace.num_layers} MoE layers of {trace.num_experts} experts, top-{trace.top_k}"


def of_sequences(trace: RoutingTrace, places: npt.NDArray[np.integer]) -> RoutingTrace:
    """The sequences at these places in the ascending order of ids, numbered anew: 0, 1, ... in that order."""
    _, sequence = np.unique(trace.sequence, return_inverse=True)
    chosen = trace.select(np.isin(sequence, places))
    _, numbers = np.unique(chosen.sequence, return_inverse=True)
    return replace(chosen, sequence=numbers.astype(np.int32))
