"""What the configurations of Hugging Face models have in common, and what it comes to here."""

from math import log
from typing import Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from exflow.limits import LayerCount, PositionCount


class RopeParameters(BaseModel):
    """`rope_parameters` of transformers 5; before that `rope_scaling`, with `rope_theta` beside it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rope_type: Literal["default", "yarn"] = Field(
        default="default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: float = Field(default=1.0, ge=1.0, le=1.0)
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositionCount | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None


class HuggingFaceConfig(BaseModel):
    """Keys that all families have. Others, which matter to training or to transformers alone, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    default_theta: ClassVar[float] = 10_000.0
    quantisations: ClassVar[tuple[str, ...]] = ()  # those that the family's layout can read

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: LayerCount
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: PositionCount
    rms_norm_eps: PositiveFloat
    num_experts: PositiveInt = Field(validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: PositiveInt
    tie_word_embeddings: bool = False
    rope_theta: PositiveFloat | None = None
    rope_parameters: RopeParameters | None = Field(
        default=None, validation_alias=AliasChoices("rope_parameters", "rope_scaling")
    )
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _weights_can_be_read(self) -> Self:
        method = (self.quantization_config or {}).get("quant_method")
        if self.quantization_config and method not in self.quantisations:
            raise ValueError(
                f"the weights are quantised ({method}), which is not supported; load the model with "
                "transformers, dequantise it, and save_pretrained() it to another folder"
            )
        return self

    def settings(self, name: str) -> dict[str, Any]:
        """Those of the ModelConfig of a model called `name`, as far as all families have them."""
        return {
            "name": name,
            "vocab_size": self.vocab_size,
            "max_positions": self.max_position_embeddings,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "activation": "swiglu",
            "num_experts": self.num_experts,
            "top_k": self.num_experts_per_tok,
            "norm": "rmsnorm",
            "norm_eps": self.rms_norm_eps,
            "rope": self.rope(),
            "tied_head": self.tie_word_embeddings,
        } | ({"head_dim": self.head_dim} if self.head_dim else {})

    def rope(self) -> dict[str, Any]:
        """The settings of a Rope."""
        given = self.rope_parameters or RopeParameters()
        theta = given.rope_theta or self.rope_theta or self.default_theta
        if given.rope_type == "default":
            return {"theta": theta}
        original = given.original_max_position_embeddings or self.max_position_embeddings
        factor = given.factor or self.max_position_embeddings / original
        yarn = {
            "factor": factor,
            "original_positions": original,
            "attention_factor": given.attention_factor or _attention_factor(factor, given),
            "beta_fast": given.beta_fast or 32.0,
            "beta_slow": given.beta_slow or 1.0,
            "truncate": given.truncate,
        }
        return {"theta": theta, "yarn": yarn}

    def same_window(self, window: int | None) -> tuple[int | None, ...]:
        """Every layer's window."""
        return () if window is None else (window,) * self.num_hidden_layers


def _attention_factor(factor: float, given: RopeParameters) -> float:
    """By which YaRN scales rotated queries and keys where the configuration does not say it."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0

    if given.mscale and given.mscale_all_dim:
        return scale(given.mscale) / scale(given.mscale_all_dim)
    return scale(1.0)
