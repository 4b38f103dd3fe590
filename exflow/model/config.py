"""Hyper-parameters of a model, stored as `config.json` beside its weights."""

from typing import Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from exflow.model.limits import (
    MAX_EXPERTS_IN_ALL,
    ExpertCount,
    HeadCount,
    LayerCount,
    PositionCount,
    Theta,
    TokenCount,
    Turns,
    Width,
)

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of the configurations: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Yarn(StrictModel):
    """YaRN: positions stretched by `factor`. Slow rotations are interpolated, fast ones are kept.

    A fast pair turns more than `beta_fast` times in `original_positions`, a slow pair less than `beta_slow`
    times. Pairs between them are on a ramp, whose ends are whole numbers if `truncate`.
    attention_factor: scale of the rotated queries and keys.
    """

    factor: PositiveFloat
    original_positions: PositionCount
    attention_factor: PositiveFloat
    beta_fast: Turns = 32.0
    beta_slow: Turns = 1.0
    truncate: bool = True


class Rope(StrictModel):
    """Rotary positions: pair i of a head's C numbers turns by theta ** (-2i / C) radians a position."""

    theta: Theta
    yarn: Yarn | None = None


class ModelConfig(StrictModel):
    """A decoder-only Mixture-of-Experts transformer.

    `gpt-moe` is the model of the ExFlow paper (section II): pre-LayerNorm, learned positions, GELU experts,
    every `moe_every`-th layer a Mixture of Experts (the last of each `moe_every` layers), the others dense.
    Published models differ from it in the other settings (exflow/model/families); all may be combined.

    head_dim            width of a head, if it is not hidden_size / num_attention_heads
    activation          a `swiglu` MLP has a gate beside its inner projection; `clamped-swiglu` is gpt-oss's,
                        with `swiglu_alpha` and `swiglu_limit` (kernels/reference.py)
    dense_layers        layers without experts, whatever `moe_every` says; dense_intermediate_size: the inner
                        width of dense layers, if not an expert's inner width
    rope                rotary positions; without it they are learned
    qk_norm             norm of queries and keys, over each `head` or over the whole `width`; qkv_clip then
                        bounds queries, keys and values
    windows             number of positions that each layer sees, a token's own included; None means all
                        positions. Empty: every layer sees all
    attention_sinks     every head has an extra score in the softmax, which adds no value
    gate_softmax        gate weights are probabilities among `all` experts, or among the `chosen` ones. By
                        default top-1 keeps its probability (Switch), top-k shares one (GShard)
    """

    model_type: Literal["gpt-moe"] = "gpt-moe"
    name: str = "gpt-moe"
    vocab_size: TokenCount
    max_positions: PositionCount
    num_hidden_layers: LayerCount
    hidden_size: Width
    num_attention_heads: HeadCount
    num_kv_heads: HeadCount
    head_dim: HeadCount = 0  # 0, which no file can contain, is replaced below
    intermediate_size: Width
    activation: Literal["gelu", "swiglu", "clamped-swiglu"] = "gelu"
    num_experts: ExpertCount
    top_k: PositiveInt = 1
    moe_every: PositiveInt = 1
    dense_layers: tuple[NonNegativeInt, ...] = ()
    dense_intermediate_size: Width = 0  # replaced below, like head_dim
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: PositiveFloat = 1e-5
    rope: Rope | None = None
    qk_norm: Literal["head", "width"] | None = None
    qkv_clip: PositiveFloat | None = None
    windows: tuple[PositionCount | None, ...] = ()
    attention_bias: bool = False
    attention_sinks: bool = False
    gate_softmax: Literal["all", "chosen"] | None = None
    gate_bias: bool = False
    expert_bias: bool = False
    swiglu_alpha: PositiveFloat = 1.702
    swiglu_limit: PositiveFloat = 7.0
    tied_head: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if not self.dense_intermediate_size:
            object.__setattr__(self, "dense_intermediate_size", self.intermediate_size)
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        for name in ("hidden_size", "intermediate_size", "dense_intermediate_size"):
            width = getattr(self, name)
            if width % 8:
                raise ValueError(f"{name} {width} is not a multiple of 8, as grouped matrix products need")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        if self.num_experts * self.num_hidden_layers > MAX_EXPERTS_IN_ALL:
            raise ValueError(
                f"num_experts {self.num_experts} in each of num_hidden_layers {self.num_hidden_layers} are "
                f"more than {MAX_EXPERTS_IN_ALL} in all"
            )
        if not self.moe_layer_ids:
            dense = f" and dense_layers {list(self.dense_layers)}" if self.dense_layers else ""
            raise ValueError(
                f"moe_every {self.moe_every}{dense} leaves no MoE layer among {self.num_hidden_layers} layers"
            )
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries for num_hidden_layers {self.num_hidden_layers}"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")
        return self

    @property
    def attention_width(self) -> int:
        """Width of all query heads side by side."""
        return self.num_attention_heads * self.head_dim

    @property
    def gate_among_all(self) -> bool:
        """True if gate weights are probabilities among all experts, False if among the chosen ones."""
        return self.top_k == 1 if self.gate_softmax is None else self.gate_softmax == "all"

    @property
    def products(self) -> int:
        """Number of matrices in an expert, or in the MLP of a layer without experts."""
        return 2 if self.activation == "gelu" else 3

    @property
    def expert_weights(self) -> int:
        """Elements in the matrices of one expert."""
        return self.products * self.hidden_size * self.intermediate_size

    @property
    def dense_mlp_weights(self) -> int:
        """Elements in the MLP of a layer without experts."""
        return self.products * self.hidden_size * self.dense_intermediate_size

    @property
    def kv_width(self) -> int:
        """Key and value elements that a token adds in one layer (w in the traffic count)."""
        return 2 * self.num_kv_heads * self.head_dim

    def positions_seen(self, context: int) -> float:
        """Positions that a token attends to when `context` positions exist; mean over layers."""
        windows = self.windows or (None,)
        return sum(context if window is None else min(window, context) for window in windows) / len(windows)

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Hidden-layer index of each MoE layer."""
        every = range(self.moe_every - 1, self.num_hidden_layers, self.moe_every)
        return tuple(layer for layer in every if layer not in self.dense_layers)
