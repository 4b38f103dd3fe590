"""OLMoE: queries and keys normed over their whole width, many small experts."""

from collections.abc import Set
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat

from exflow.model.families.config import HuggingFaceConfig
from exflow.model.families.layout import PROJECTIONS, Layout, gated_experts, hugging_face_layout, single

if TYPE_CHECKING:
    from exflow.model.config import ModelConfig


class OlmoeConfig(HuggingFaceConfig):
    rms_norm_eps: PositiveFloat = 1e-5
    attention_bias: bool = False
    clip_qkv: PositiveFloat | None = None
    norm_topk_prob: bool = False

    def settings(self, name: str) -> dict[str, Any]:
        return super().settings(name) | {
            "qk_norm": "width",
            "qkv_clip": self.clip_qkv,
            "attention_bias": self.attention_bias,
            "gate_softmax": "chosen" if self.norm_topk_prob else "all",
        }


def layout(config: "ModelConfig", stored: Set[str]) -> Layout:
    whole = hugging_face_layout(config, stored)
    for layer in config.moe_layer_ids:
        ours, theirs = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
        gate = single(f"{theirs}.gate.weight", config.num_experts, config.hidden_size)
        whole[f"{ours}.router.gate.weight"] = gate
        whole |= gated_experts(config, f"{theirs}.experts", ours, PROJECTIONS, stored)
    return whole
