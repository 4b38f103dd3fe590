"""Routing replay: a trace dictates the experts of each token, so that random weights have real traffic.

Shapes: T tokens at hand, R rows of the trace, n sequences in it, L MoE layers, K choices.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from exflow.errors import InputError
from exflow.model.config import ModelConfig
from exflow.profiling.trace import RoutingTrace


@dataclass(frozen=True)
class ReplayedRouting:
    """The routing of a trace, sequence after sequence in ascending id, on a device.

    expert [R, L, K] int64: logical ids, first choice first. start, length [n] int64: sequence number i has
    the length[i] rows from start[i] on, in order of position. A short trace repeats: the trace's sequence
    number s mod n dictates the model's sequence s, with its row p mod length at position p.
    """

    expert: Tensor
    start: Tensor
    length: Tensor

    @classmethod
    def of(cls, trace: RoutingTrace, config: ModelConfig, device: torch.device) -> Self:
        """Load the first `config.top_k` choices of `trace`, for the model `config`.

        Raises InputError if MoE layers, experts or choices do not fit.
        """
        check_replay(trace, config)
        order = np.argsort(trace.sequence, kind="stable")  # rows of one sequence are in order already
        length = np.unique(trace.sequence, return_counts=True)[1]
        arrays = (trace.experts[order, :, : config.top_k], np.cumsum(length) - length, length)
        return cls(*(torch.from_numpy(np.ascontiguousarray(each, np.int64)).to(device) for each in arrays))

    def row_of(self, sequence_T: Tensor, position_T: Tensor) -> Tensor:
        """The trace's row [T] int64 for each token, given by sequence id and position [T] int64."""
        number_T = sequence_T % len(self.length)
        return self.start[number_T] + position_T % self.length[number_T]

    def experts(self, layer: int, row_T: Tensor) -> Tensor:
        """The experts [T, K] int64 of MoE layer `layer` in rows `row_T` of the trace."""
        return self.expert[row_T, layer]


def load_replay(folder: Path, config: ModelConfig) -> RoutingTrace:
    """Open the trace in `folder` to replay it on a model; raises InputError if it does not fit the model."""
    trace = RoutingTrace.load(folder)
    try:
        check_replay(trace, config)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return trace


def check_replay(trace: RoutingTrace, config: ModelConfig) -> None:
    """Raise InputError for a trace that cannot dictate the routing of the model `config`."""
    if not trace.num_tokens:
        raise InputError(f"the trace of '{trace.model}' holds no tokens; replay another")
    layers = len(config.moe_layer_ids)
    for what, recorded, needed in (
        ("MoE layers", trace.num_layers, layers),
        ("experts a layer", trace.num_experts, config.num_experts),
    ):
        if recorded != needed:
            raise InputError(
                f"the trace of '{trace.model}' has {recorded} {what}, the model '{config.name}' {needed}; "
                "replay a trace of a model of the same shape"
            )
    if trace.top_k < config.top_k:
        raise InputError(
            f"the trace of '{trace.model}' has top_k {trace.top_k}, the model '{config.name}' "
            f"{config.top_k}; replay a trace with as many, or lower top_k in the model's config.json"
        )
