"""What a trace says about the model: which layers route, among how many experts, how many a token takes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from exflow.errors import InputError

MAX_EXPERTS = 1 << 16  # ids are stored in 16 bits at most


@dataclass(frozen=True)
class RoutingLayout:
    """The routed part of a model.

    `moe_layer_ids[l]` is the hidden-layer index of MoE layer l; every MoE layer has `num_experts` routed
    experts, and a token selects `top_k` of them. Raises InputError where the numbers contradict each other.
    """

    model: str
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int

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

    @property
    def num_layers(self) -> int:
        """The number of MoE layers."""
        return len(self.moe_layer_ids)

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The dtype of expert ids: uint8 up to 256 experts, else uint16 (both little-endian on disk)."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)
