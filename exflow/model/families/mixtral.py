"""Mixtral: every layer is a Mixture of Experts, optionally with a sliding window."""

from collections.abc import Set
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PositiveFloat, PositiveInt

from exflow.model.families.config import HuggingFaceConfig
from exflow.model.families.layout import ExpertNames, Layout, gated_experts, hugging_face_layout, single

if TYPE_CHECKING:
    from exflow.model.config import ModelConfig

NAMES = ExpertNames(gate="w1", up="w3", down="w2")


class MixtralConfig(HuggingFaceConfig):
    default_theta: ClassVar[float] = 1_000_000.0
    num_key_value_heads: PositiveInt | None = 8
    rms_norm_eps: PositiveFloat = 1e-5
    sliding_window: PositiveInt | None = None

    def settings(self, name: str) -> dict[str, Any]:
        return super().settings(name) | {
            "gate_softmax": "chosen",
            "windows": self.same_window(self.sliding_window),
        }


def layout(config: "ModelConfig", stored: Set[str]) -> Layout:
    """Published checkpoints call the MoE module `block_sparse_moe`, transformers 5 calls it `mlp`."""
    whole = hugging_face_layout(config, stored)
    for layer in config.moe_layer_ids:
        ours, module = f"blocks.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        if f"{module}.gate.weight" not in stored:
            module = f"model.layers.{layer}.mlp"
        gate = single(f"{module}.gate.weight", config.num_experts, config.hidden_size)
        whole[f"{ours}.router.gate.weight"] = gate
        whole |= gated_experts(config, f"{module}.experts", ours, NAMES, stored)
    return whole
