"""The routed part of a model, as a trace holds it: MoE layers, experts of each, experts per token."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exflow.errors import InputError

MAX_EXPERTS = 1 << 16  # ids are stored in 16 bits at most


@dataclass(frozen=True)
class RoutingLayout:
    """The routed part of a model.

    `moe_layer_ids[l]` is the hidden-layer index of MoE layer l; every MoE layer has `num_experts` routed
    experts, and a token selects `top_k` of them. Where layers differ, `experts_per_layer` says how many each
    has, and `num_experts` is the most; where all are alike it becomes None. Raises InputError where the
    numbers contradict each other.
    """

    model: str
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    experts_per_layer: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise InputError(f"num_experts: is {self.num_experts}; give a number from 1 to {MAX_EXPERTS}")
        if self.top_k < 1:
            raise InputError(f"top_k: is {self.top_k}; give 1 or more")
        ids = self.moe_layer_ids
        if not ids or ids[0] < 0 or list(ids) != sorted(set(ids)):
            raise InputError(
                f"moe_layer_ids: are {list(ids)}; give ascending hidden-layer indices, at least one"
            )
        if ids[-1] >= self.num_hidden_layers:
            raise InputError(
                f"moe_layer_ids: layer {ids[-1]} is not among {self.num_hidden_layers} hidden layers; "
                f"give indices below num_hidden_layers"
            )
        if self.experts_per_layer is not None:
            _check_counts(self.experts_per_layer, self.num_layers, self.num_experts)
            if min(self.experts_per_layer) == self.num_experts:
                object.__setattr__(self, "experts_per_layer", None)  # so that equal layouts compare equal

    @property
    def num_layers(self) -> int:
        """The number of MoE layers."""
        return len(self.moe_layer_ids)

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """The number of experts of each MoE layer, whether layers differ or not."""
        return self.experts_per_layer or (self.num_experts,) * self.num_layers

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The dtype of expert ids: uint8 up to 256 experts, else uint16 (both little-endian on disk)."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)

    def metadata(self) -> dict[str, Any]:
        """The fields as a trace's digest has them: without `experts_per_layer` where the layers are alike."""
        fields = asdict(self)
        if self.experts_per_layer is None:
            del fields["experts_per_layer"]
        return fields


def _check_counts(counts: tuple[int, ...], num_layers: int, num_experts: int) -> None:
    if len(counts) != num_layers:
        raise InputError(
            f"experts_per_layer: has {len(counts)} entries for {num_layers} MoE layers; give one each"
        )
    for layer, count in enumerate(counts):
        if not 1 <= count <= num_experts:
            raise InputError(
                f"experts_per_layer: is {count} in MoE layer {layer}; "
                f"give a number from 1 to num_experts, which is {num_experts}"
            )
    if max(counts) != num_experts:
        raise InputError(
            f"num_experts: is {num_experts}, but no layer has more than {max(counts)} in experts_per_layer; "
            f"give {max(counts)}"
        )
