"""Role of a tensor of a Hugging Face checkpoint, told by its name.

One table of patterns covers the families: they share few ways to name an expert, a router and a shared
expert. A name that speaks of experts in another way is an error, since its rows could not follow the plan.
"""

import re
from dataclasses import dataclass
from enum import Enum

from exflow.errors import InputError


class Kind(Enum):
    OWN = "a tensor of one expert: it is renamed"
    STACKED = "a tensor that stacks the experts of a layer: its first dimension is permuted"
    ROUTER = "rows of a router, or a number for each expert: they are permuted"
    SHARED = "a part of a shared expert: it is copied"
    DRAFT = "a part of a layer of multi-token prediction: it is copied"
    OTHER = "a tensor outside the routed experts: it is copied"


@dataclass(frozen=True)
class Role:
    """The role of a tensor.

    stack   what stands before "layers." in its name: models of several modalities have several stacks
    layer   index of the hidden layer; None outside the layers
    expert  the expert that an OWN tensor belongs to
    """

    kind: Kind
    stack: str = ""
    layer: int | None = None
    expert: int | None = None


_BLOCK = r"(?:(?:mlp|ffn|feed_forward|block_sparse_moe|moe|mixer)\.){0,2}"
_MATRIX = r"(?:gate_up_proj|gate_and_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|w13|fc1|fc2)s?"
_PART = (
    r"(?:[._](?:weight|bias|blocks|scales|scale|scale_inv|packed|weight_packed|weight_scale|weight_scale_inv"
    r"|weight_scale_2|weight_global_scale|input_scale|input_global_scale))*"
)
_CORRECTION = r"(?:e_score_correction_bias|expert_bias|router_bias|correction_bias)"
_SHARED = r"(?:.*\.)?(?:shared?_experts?|shared_mlp|shared_expert_gate)(?:_gate)?(?:\..*)?"

# Tried in this order on the part of a name behind "layers.N.".
_PATTERNS = (
    (Kind.SHARED, re.compile(_SHARED)),
    # mlp.gate.e_score_correction_bias, block_sparse_moe.e_score_correction_bias,
    # mlp.moe_statics.e_score_correction_bias, mlp.experts.e_score_correction_bias, feed_forward.expert_bias
    (Kind.ROUTER, re.compile(rf"{_BLOCK}(?:(?:gate|router|moe_statics|experts)\.){{0,2}}{_CORRECTION}")),
    # mlp.gate.weight, mlp.router.weight and .bias, mlp.gate.wg.weight, mlp.router.gate.weight,
    # block_sparse_moe.router.layer.weight
    (
        Kind.ROUTER,
        re.compile(rf"{_BLOCK}(?:gate|router)(?:\.(?:wg|gate|layer))?\.(?:weight|bias|weight_scale)"),
    ),
    # mlp.experts.7.down_proj.weight, block_sparse_moe.experts.7.w2.qweight, mixer.experts.7.up_proj.weight
    (Kind.OWN, re.compile(rf"{_BLOCK}experts\.(?P<expert>\d+)\.[^.].*")),
    # mlp.experts.gate_up_proj_blocks, feed_forward.experts.down_proj, block_sparse_moe.input_linear.weight,
    # moe.gate_proj.weight
    (Kind.STACKED, re.compile(rf"{_BLOCK}experts\.{_MATRIX}{_PART}")),
    (Kind.STACKED, re.compile(rf"block_sparse_moe\.(?:input|output)_linear{_PART}")),
    (Kind.STACKED, re.compile(rf"moe\.{_MATRIX}{_PART}")),
)
_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)")
_DRAFT = re.compile(r"(?:.*\.)?(?:mtp|nextn)(?:_\w+)?\..*")
_SPEAKS_OF_EXPERTS = re.compile(
    r".*expert.*|(?:.*\.)?router\b.*|.*correction_bias.*|(?:.*\.)?(?:block_sparse_moe|moe)\..*"
    r"|(?:mlp|ffn|feed_forward|mixer)\.gate\b.*",
    re.IGNORECASE,
)


def role_of(name: str, num_hidden_layers: int) -> Role:
    """The role of the tensor `name` in a model of `num_hidden_layers` layers.

    Layers behind the last one predict several tokens. Raises InputError if the name speaks of experts in no
    known way.
    """
    found = _LAYER.fullmatch(name)
    if _DRAFT.fullmatch(name):
        return Role(Kind.DRAFT)
    if found is None:
        _refuse_if_of_experts(name, name)
        return Role(Kind.OTHER)
    stack, layer, rest = found["stack"], int(found["layer"]), found["rest"]
    for kind, pattern in _PATTERNS:
        if matched := pattern.fullmatch(rest):
            expert = int(matched["expert"]) if kind == Kind.OWN else None
            return Role(_in_layer(kind, layer, num_hidden_layers), stack, layer, expert)
    if layer >= num_hidden_layers:
        return Role(Kind.DRAFT, stack, layer)
    _refuse_if_of_experts(name, rest)
    return Role(Kind.OTHER, stack, layer)


def renamed(name: str, role: Role, expert: int) -> str:
    """The name of the same part of another expert. The name is one of an OWN tensor."""
    head, tail = name.split(f".experts.{role.expert}.", 1)
    return f"{head}.experts.{expert}.{tail}"


def _in_layer(kind: Kind, layer: int, num_hidden_layers: int) -> Kind:
    return kind if layer < num_hidden_layers else Kind.DRAFT


def _refuse_if_of_experts(name: str, part: str) -> None:
    if _SPEAKS_OF_EXPERTS.fullmatch(part):
        raise InputError(
            f"the tensor '{name}' speaks of experts in no known way, so it cannot be renumbered; save the "
            "model with save_pretrained() of transformers, or report the name"
        )
