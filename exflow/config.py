"""What a model is: the hyper-parameters stored as `config.json` beside its weights."""

import reprlib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from exflow.errors import InputError
from exflow.files import read_json

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(StrictModel):
    """A decoder-only Mixture-of-Experts transformer.

    `gpt-moe` is the model of the ExFlow paper (section II): pre-LayerNorm, learned positions, GELU experts,
    every `moe_every`-th layer a Mixture of Experts (the last layer of each such group), the others dense.
    Published models are modelled by their shape alone (configs/shapes): `head_dim` is the width of a head,
    if it is not hidden_size / num_attention_heads; a `swiglu` MLP has a gate beside its inner projection.
    """

    model_type: Literal["gpt-moe"] = "gpt-moe"
    name: str = "gpt-moe"
    vocab_size: PositiveInt
    max_positions: PositiveInt
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt = 0  # 0, which no file can say, is replaced below
    intermediate_size: PositiveInt
    activation: Literal["gelu", "swiglu"] = "gelu"
    num_experts: PositiveInt
    top_k: PositiveInt = 1
    moe_every: PositiveInt = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        for name in ("hidden_size", "intermediate_size"):
            width = getattr(self, name)
            if width % 8:
                raise ValueError(f"{name} {width} is not a multiple of 8, as grouped matrix products need")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        if not self.moe_layer_ids:
            raise ValueError(
                f"moe_every {self.moe_every} leaves no MoE layer among {self.num_hidden_layers} layers"
            )
        return self

    @property
    def attention_width(self) -> int:
        """Width of all query heads side by side."""
        return self.num_attention_heads * self.head_dim

    @property
    def expert_weights(self) -> int:
        """Numbers in one expert, or in the MLP of a layer without experts."""
        products = 3 if self.activation == "swiglu" else 2
        return products * self.hidden_size * self.intermediate_size

    @property
    def kv_width(self) -> int:
        """Numbers of keys and values a token adds in one layer (w in the traffic count)."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Hidden-layer index of each MoE layer."""
        return tuple(range(self.moe_every - 1, self.num_hidden_layers, self.moe_every))


def validated(kind: type[Model], value: Any, source: Path) -> Model:
    """Build a pydantic model from what `source` held; the first thing wrong becomes a one-line InputError."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_wrong(kind, error)}") from error


def _first_wrong(kind: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    found = reprlib.repr(first["input"])
    if not first["loc"] and first["type"] == "model_type":
        return f"holds {found}, not the keys {', '.join(kind.model_fields)}; write them"
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        found_in: Any = kind
        for part in first["loc"][:-1]:
            found_in = found_in.model_fields[str(part)].annotation
        return f"unknown key {key!r}; remove it (known: {', '.join(found_in.model_fields)})"
    if first["type"] == "missing":
        return f"the key {key!r} is missing; add it"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # one of our own, which names the keys and their values
        return f"{key}: {reason}" if key else reason
    return f"{key} = {found}: {reason}"


def load_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder."""
    path = folder / "config.json"
    remedy = "give the folder of a checkpoint (config.json, model.safetensors, tokenizer.json)"
    return validated(ModelConfig, read_json(path, "model configuration", remedy), path)
