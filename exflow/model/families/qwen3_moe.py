"""Qwen3-MoE: queries and keys normed head by head; some layers may be dense, of another inner width."""

from collections.abc import Set
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from exflow.model.families.config import HuggingFaceConfig
from exflow.model.families.layout import (
    PROJECTIONS,
    Layout,
    Piece,
    Stored,
    gate_and_up,
    gated_experts,
    hugging_face_layout,
    single,
)

if TYPE_CHECKING:
    from exflow.model.config import ModelConfig


class Qwen3MoeConfig(HuggingFaceConfig):
    num_key_value_heads: PositiveInt | None = 4
    rms_norm_eps: PositiveFloat = 1e-6
    attention_bias: bool = False
    moe_intermediate_size: PositiveInt
    norm_topk_prob: bool = False
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: tuple[NonNegativeInt, ...] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096  # any value if it is not used

    def settings(self, name: str) -> dict[str, Any]:
        return super().settings(name) | {
            "intermediate_size": self.moe_intermediate_size,
            "dense_intermediate_size": self.intermediate_size,
            "moe_every": self.decoder_sparse_step,
            "dense_layers": self.mlp_only_layers or (),
            "qk_norm": "head",
            "attention_bias": self.attention_bias,
            "windows": self.same_window(self.sliding_window if self.use_sliding_window else None),
            "gate_softmax": "chosen" if self.norm_topk_prob else "all",
        }


def layout(config: "ModelConfig", stored: Set[str]) -> Layout:
    whole = hugging_face_layout(config, stored)
    inner, hidden = config.dense_intermediate_size, config.hidden_size
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
        if layer in config.moe_layer_ids:
            gate = single(f"{theirs}.gate.weight", config.num_experts, hidden)
            whole[f"{ours}.router.gate.weight"] = gate
            whole |= gated_experts(config, f"{theirs}.experts", ours, PROJECTIONS, stored)
        else:
            whole[f"{ours}.w_in.weight"] = [gate_and_up(theirs, PROJECTIONS, inner, hidden)]
            whole[f"{ours}.w_out.weight"] = [Piece((Stored(f"{theirs}.down_proj.weight", (hidden, inner)),))]
    return whole
