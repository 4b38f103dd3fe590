"""Layouts: the stored tensors from which each parameter of a decoder is built.

A layout lists the pieces of every parameter: one piece for most, one for each expert if the parameter holds
experts. So a rank reads only the pieces of its own experts.
"""

import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from exflow.model.config import ModelConfig


Joined = Callable[[list[Tensor]], Tensor]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that earlier versions of transformers stored beside the weights; config.json implies them.
LEFT_OVER = re.compile(
    r"(.*\.)?(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached"
    r"|(attn|attention|self_attn)\.(bias|masked_bias|causal_mask)|position_ids)"
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, and the shape it must have.

    row: one entry of its first dimension; None means all. packed: its bytes hold quantised numbers.
    """

    name: str
    shape: tuple[int, ...]
    row: int | None = None
    packed: bool = False


@dataclass(frozen=True)
class Piece:
    """A parameter, or one expert's part of it: `join` of stored tensors, by default their concatenation."""

    parts: tuple[Stored, ...]
    join: Joined = torch.cat


Layout = dict[str, list[Piece]]


def single(name: str, *shape: int) -> list[Piece]:
    """A parameter that is one stored tensor."""
    return [Piece((Stored(name, shape),))]


def own_layout(config: "ModelConfig", shapes: dict[str, tuple[int, ...]]) -> Layout:
    """Layout of our own checkpoints: one tensor for each parameter, under its name; experts are stacked.

    shapes: shapes of the parameters of a decoder that holds any number of experts.
    """
    layout = {}
    for name, shape in shapes.items():
        if ".experts." in name:
            whole = (config.num_experts, *shape[1:])
            layout[name] = [Piece((Stored(name, whole, row),)) for row in range(config.num_experts)]
        else:
            layout[name] = single(name, *shape)
    return layout


def hugging_face_layout(config: "ModelConfig", stored: Set[str]) -> Layout:
    """Layout common to the families: all parameters but the MLPs, under the names of transformers.

    For a tied head, the head or the embedding may be stored.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    under_the_head = config.tied_head and EMBEDDING not in stored and HEAD in stored
    layout = {
        "embedding.weight": single(HEAD if under_the_head else EMBEDDING, vocabulary, hidden),
        "norm.weight": single("model.norm.weight", hidden),
    }
    if not config.tied_head:
        layout["head.weight"] = single(HEAD, vocabulary, hidden)
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        layout |= _attention(config, f"{theirs}.self_attn", f"{ours}.attention")
        layout[f"{ours}.attention.norm.weight"] = single(f"{theirs}.input_layernorm.weight", hidden)
        layout[f"{ours}.mlp.norm.weight"] = single(f"{theirs}.post_attention_layernorm.weight", hidden)
    return layout


def _attention(config: "ModelConfig", theirs: str, ours: str) -> Layout:
    hidden, wide, narrow = config.hidden_size, config.attention_width, config.kv_width // 2
    rows = {"q": wide, "k": narrow, "v": narrow}

    def side_by_side(part: str, *width: int) -> list[Piece]:
        return [Piece(tuple(Stored(f"{theirs}.{x}_proj.{part}", (n, *width)) for x, n in rows.items()))]

    layout = {
        f"{ours}.qkv.weight": side_by_side("weight", hidden),
        f"{ours}.out.weight": single(f"{theirs}.o_proj.weight", hidden, wide),
    }
    if config.attention_bias:
        layout[f"{ours}.qkv.bias"] = side_by_side("bias")
        layout[f"{ours}.out.bias"] = single(f"{theirs}.o_proj.bias", hidden)
    if config.qk_norm:
        for x in ("q", "k"):
            width = config.head_dim if config.qk_norm == "head" else rows[x]
            layout[f"{ours}.{x}_norm.weight"] = single(f"{theirs}.{x}_norm.weight", width)
    if config.attention_sinks:
        layout[f"{ours}.sinks"] = single(f"{theirs}.sinks", config.num_attention_heads)
    return layout


@dataclass(frozen=True)
class ExpertNames:
    """A family's names for the matrices of a gated expert, if each expert has its own tensors."""

    gate: str
    up: str
    down: str


PROJECTIONS = ExpertNames("gate_proj", "up_proj", "down_proj")


def gated_experts(
    config: "ModelConfig", theirs: str, ours: str, names: ExpertNames, stored: Set[str]
) -> Layout:
    """Layout of a layer's experts, with tensors for each expert or stacked. theirs: name of their module.

    `save_pretrained(save_original_format=False)` writes stacked tensors.
    """
    inner, hidden = config.intermediate_size, config.hidden_size
    w_in, w_out = f"{ours}.experts.w_in", f"{ours}.experts.w_out"
    experts = range(config.num_experts)
    if f"{theirs}.gate_up_proj" in stored:
        both = (config.num_experts, 2 * inner, hidden)
        down = (config.num_experts, hidden, inner)
        return {
            w_in: [Piece((Stored(f"{theirs}.gate_up_proj", both, expert),)) for expert in experts],
            w_out: [Piece((Stored(f"{theirs}.down_proj", down, expert),)) for expert in experts],
        }
    return {
        w_in: [gate_and_up(f"{theirs}.{expert}", names, inner, hidden) for expert in experts],
        w_out: [
            Piece((Stored(f"{theirs}.{expert}.{names.down}.weight", (hidden, inner)),)) for expert in experts
        ],
    }


def gate_and_up(theirs: str, names: ExpertNames, inner: int, hidden: int) -> Piece:
    """The rows of the gate projection, then the rows of the up projection."""
    return Piece(tuple(Stored(f"{theirs}.{name}.weight", (inner, hidden)) for name in (names.gate, names.up)))
