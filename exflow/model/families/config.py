"""Keys common to the configurations of Hugging Face models, and their conversion to ours."""

from typing import Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, PositiveFloat, PositiveInt, model_validator

from exflow.model.families.rope import RopeConfig
from exflow.model.limits import LayerCount


class HuggingFaceConfig(RopeConfig):
    """Keys that all families have. Keys that only training or transformers use are ignored."""

    quantisations: ClassVar[tuple[str, ...]] = ()  # methods that the family's layout can read

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: LayerCount
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: Literal["silu", "swish"] = "silu"  # two names of one function
    is_causal: Literal[True] | None = None
    rms_norm_eps: PositiveFloat
    num_experts: PositiveInt = Field(validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: PositiveInt
    tie_word_embeddings: bool = False
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
        """Settings of a ModelConfig called `name`; a family's subclass adds its own."""
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

    def same_window(self, window: int | None) -> tuple[int | None, ...]:
        """`window` for every layer; empty if there is none."""
        return () if window is None else (window,) * self.num_hidden_layers
