"""Routing trace of a job, merged from all ranks: a rank sees a token only in layers in which it owns it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from exflow.profiling.layout import RoutingLayout
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.engine import Engine


@dataclass(frozen=True)
class Decisions:
    """The n routing decisions that one rank has seen."""

    place: npt.NDArray[np.int64]  # [n, 4]: MoE layer, sequence, position, phase
    experts: npt.NDArray[np.int64]  # [n, top_k]


class JobRecorder:
    """Records this rank's routing; `trace` merges the records of all ranks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.layout = engine.routing_layout()
        self.parts: list[Decisions] = []
        self.stop = engine.add_routing_listener(self.listen)

    def listen(
        self, layer: int, expert_ids: Tensor, weights: Tensor, sequence: Tensor, position: Tensor, phase: int
    ) -> None:
        place = np.empty((len(sequence), 4), np.int64)
        place[:, 0], place[:, 3] = layer, phase
        place[:, 1], place[:, 2] = sequence.cpu().numpy(), position.cpu().numpy()
        self.parts.append(Decisions(place, expert_ids.cpu().numpy()))

    def trace(self) -> RoutingTrace:
        """Stop recording, and return the trace of the whole job. Collective."""
        self.stop()
        mine = Decisions(
            np.concatenate([part.place for part in self.parts]),
            np.concatenate([part.experts for part in self.parts]),
        )
        return merge_decisions(self.engine.all_gather_object(mine), self.layout)


def merge_decisions(parts: list[Decisions], layout: RoutingLayout) -> RoutingTrace:
    """Merge decisions to one row a token, ordered by sequence and position; duplicates count once."""
    place, first = np.unique(np.concatenate([part.place for part in parts]), axis=0, return_index=True)
    experts = np.concatenate([part.experts for part in parts])[first]
    tokens = len(place) // layout.num_layers
    by_layer = place.reshape(layout.num_layers, tokens, 4)  # sorted by layer, sequence, position
    assert (by_layer[:, :, 1:] == by_layer[0, :, 1:]).all(), "a token was routed in some layers only"
    return RoutingTrace.from_arrays(
        experts.reshape(layout.num_layers, tokens, -1).transpose(1, 0, 2),
        num_experts=layout.num_experts,
        sequence=by_layer[0, :, 1],
        position=by_layer[0, :, 2],
        phase=by_layer[0, :, 3],
        model=layout.model,
        moe_layer_ids=layout.moe_layer_ids,
        num_hidden_layers=layout.num_hidden_layers,
    )
