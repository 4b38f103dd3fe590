"""gpt-oss: attention sinks, windows in every other layer, YaRN, biases everywhere, clamped SwiGLU.

Its experts are stacked, with the rows of gate and up interleaved. Published weights are MXFP4: blocks of 32
numbers of 4 bits that share a power of two. They are dequantised and take the decoder's dtype.

Shapes: E experts, D hidden, F inner width, G blocks of a row.
"""

from collections.abc import Set
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from exflow.model.families.config import HuggingFaceConfig
from exflow.model.families.layout import Joined, Layout, Piece, Stored, hugging_face_layout, single
from exflow.model.families.rope import RopeParameters

if TYPE_CHECKING:
    from exflow.model.config import ModelConfig

BLOCK = 32
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the highest of the four bits is the sign
PUBLISHED_ROPE = RopeParameters(
    rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False
)


class GptOssConfig(HuggingFaceConfig):
    default_theta: ClassVar[float] = 150_000.0
    default_rope: ClassVar[RopeParameters] = PUBLISHED_ROPE
    quantisations: ClassVar[tuple[str, ...]] = ("mxfp4",)
    num_key_value_heads: PositiveInt | None = 8
    rms_norm_eps: PositiveFloat = 1e-5
    head_dim: PositiveInt = 64
    attention_bias: bool = True
    sliding_window: PositiveInt | None = 128
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] | None = None
    swiglu_alpha: PositiveFloat = 1.702
    swiglu_limit: PositiveFloat = 7.0

    def settings(self, name: str) -> dict[str, Any]:
        every_other = ("sliding_attention", "full_attention") * self.num_hidden_layers
        kinds = self.layer_types or every_other[: self.num_hidden_layers]
        return super().settings(name) | {
            "activation": "clamped-swiglu",
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_limit": self.swiglu_limit,
            "attention_bias": self.attention_bias,
            "attention_sinks": True,
            "windows": tuple(self.sliding_window if kind == "sliding_attention" else None for kind in kinds),
            "gate_softmax": "chosen",
            "gate_bias": True,
            "expert_bias": True,
        }


def layout(config: "ModelConfig", stored: Set[str]) -> Layout:
    whole = hugging_face_layout(config, stored)
    experts, hidden = config.num_experts, config.hidden_size
    for layer in config.moe_layer_ids:
        ours, theirs = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
        whole[f"{ours}.router.gate.weight"] = single(f"{theirs}.router.weight", experts, hidden)
        whole[f"{ours}.router.gate.bias"] = single(f"{theirs}.router.bias", experts)
        whole |= _experts(config, f"{theirs}.experts", f"{ours}.experts", stored)
    return whole


def _experts(config: "ModelConfig", theirs: str, ours: str, stored: Set[str]) -> Layout:
    hidden, inner = config.hidden_size, config.intermediate_size
    up, down = f"{theirs}.gate_up_proj", f"{theirs}.down_proj"
    each = partial(_each, config.num_experts)
    return {
        f"{ours}.w_in": each(*_matrix(up, 2 * inner, hidden, stored), take_turns=True),
        f"{ours}.w_out": each(*_matrix(down, hidden, inner, stored)),
        f"{ours}.b_in": each({f"{up}_bias": (2 * inner,)}, torch.cat, take_turns=True),
        f"{ours}.b_out": each({f"{down}_bias": (hidden,)}, torch.cat),
    }


def _matrix(
    name: str, rows: int, columns: int, stored: Set[str]
) -> tuple[dict[str, tuple[int, ...]], Joined]:
    """Stored tensors of each expert's matrix [rows, columns]: their shapes by name, and how to join them."""
    if f"{name}_blocks" in stored:
        blocks = columns // BLOCK
        return {f"{name}_blocks": (rows, blocks, BLOCK // 2), f"{name}_scales": (rows, blocks)}, dequantised
    return {name: (columns, rows)}, transposed


def _each(
    experts: int, shapes: dict[str, tuple[int, ...]], read: Joined, take_turns: bool = False
) -> list[Piece]:
    """A piece for each expert. take_turns: gate and up rows are interleaved; gate rows are put first."""

    def gates_first(parts: list[Tensor]) -> Tensor:
        rows = read(parts)
        return torch.cat([rows[::2], rows[1::2]])

    return [
        Piece(
            tuple(
                Stored(name, (experts, *shape), expert, packed=read is dequantised)
                for name, shape in shapes.items()
            ),
            gates_first if take_turns else read,
        )
        for expert in range(experts)
    ]


def transposed(parts: list[Tensor]) -> Tensor:
    return parts[0].T


def dequantised(parts: list[Tensor]) -> Tensor:
    """Dequantise MXFP4 blocks [rows, G, 16] and scales [rows, G] to [rows, G * 32] bfloat16, without loss.

    A byte has two numbers, the lower four bits first; a scale s stands for 2 ** (s - 127).
    """
    blocks, scales = parts
    values = torch.tensor([*FP4, *(-value for value in FP4)])
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    numbers = torch.ldexp(values[pairs.long()], scales[..., None].int() - 127)
    return numbers.flatten(-2).to(torch.bfloat16)
