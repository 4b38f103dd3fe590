"""The decoder. Its modules know neither the K/V cache nor the other ranks.

Two arguments of `forward` differ between training, a single process and a rank of many: an `AttentionContext`
knows where keys and values are, an `MoELayout` knows where experts are. A token may leave this rank in an MoE
layer, so a forward pass carries `Rows`, the identity of the tokens at hand.

Shapes: T tokens at hand, D hidden, H query heads, J key/value heads, C head width, K choices, E experts,
S expert slots held here, F inner width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exflow.kernels.experts import Backend, expert_mlp
from exflow.kernels.reference import Activation, ClampedSwiglu, rows_of_w_in, swiglu
from exflow.model.config import ModelConfig
from exflow.model.replay import ReplayedRouting
from exflow.model.rotary import Rotary
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.listener import RoutingListener

Norm = nn.LayerNorm | nn.RMSNorm


@dataclass(frozen=True)
class Rows:
    """Identity of each row's token: sequence id and position [T] int64. phase: one for all rows."""

    sequence_T: Tensor
    position_T: Tensor
    phase: int


@dataclass(frozen=True)
class Routing:
    """The gate's choice: logical expert ids [T, K] int64, best first, and their weights [T, K] float32.

    probability_TE: the softmax over all experts [T, E] float32.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    probability_TE: Tensor


class AttentionContext(Protocol):
    def attend(self, layer: "Attention", q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        """Store the new keys and values of layer `layer.index`; return the attention output [T, H, C].

        A token sees the last `layer.window` positions, its own included; None means all. If there are
        `layer.sinks` [H], they join the scores.
        """


class MoELayout(Protocol):
    def moe(self, layer: "MoE", hidden_TD: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """Add the layer's output to the residual stream; returns it with the rows now at hand."""


def _norm(config: ModelConfig, width: int) -> Norm:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(width, eps=config.norm_eps)


def _activation(config: ModelConfig) -> Activation:
    if config.activation == "clamped-swiglu":
        return ClampedSwiglu(config.swiglu_alpha, config.swiglu_limit)
    return F.gelu if config.activation == "gelu" else swiglu


class Attention(nn.Module):
    """Norm, projections and positions of hidden layer `index`; an AttentionContext computes attention."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim, self.clip = config.head_dim, config.qkv_clip
        self.window = config.windows[index] if config.windows else None
        self.rotary = None if config.rope is None else Rotary(config.rope, config.head_dim)
        self.widths = [config.attention_width, config.kv_width // 2, config.kv_width // 2]
        self.norm = _norm(config, config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, sum(self.widths), bias=config.attention_bias)
        self.out = nn.Linear(config.attention_width, config.hidden_size, bias=config.attention_bias)
        normed = [self.head_dim] * 2 if config.qk_norm == "head" else self.widths[:2]
        self.q_norm, self.k_norm = (_norm(config, width) if config.qk_norm else None for width in normed)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None

    def forward(self, hidden_TD: Tensor, rows: Rows, context: AttentionContext) -> Tensor:
        q, k, v = self.qkv(self.norm(hidden_TD)).split(self.widths, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _norm_parts(self.q_norm, q), _norm_parts(self.k_norm, k)
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        q_THC, k_TJC, v_TJC = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.rotary is not None:
            q_THC, k_TJC = self.rotary(rows.position_T, q_THC, k_TJC)
        attended_THC = context.attend(self, q_THC, k_TJC, v_TJC, rows)
        out_TD: Tensor = self.out(attended_THC.flatten(1))
        return hidden_TD + out_TD


def _norm_parts(norm: Norm, values: Tensor) -> Tensor:
    """Apply `norm` to each part of a row; a part is as wide as the norm."""
    normed: Tensor = norm(values.unflatten(-1, (-1, *norm.normalized_shape)))
    return normed.flatten(-2)


class Router(nn.Module):
    """Chooses the most probable experts of each token. Weights are probabilities among all or chosen experts.

    If experts are dictated, the gate still computes their weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.among_all = config.gate_among_all
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=config.gate_bias)

    def forward(self, hidden_TD: Tensor, expert_TK: Tensor | None = None) -> Routing:
        """expert_TK: the experts to use [T, K] int64; None means the most probable ones."""
        logits_TE = self.logits(hidden_TD)
        probability_TE = logits_TE.softmax(dim=-1)
        if expert_TK is None:
            expert_TK = probability_TE.topk(self.top_k, dim=-1).indices
        if self.among_all:
            weight_TK = probability_TE.gather(1, expert_TK)
        else:  # softmax of logits: probabilities of dictated experts may all be 0
            weight_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
        return Routing(expert_TK, weight_TK, probability_TE)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """The gate's scores [T, E] float32."""
        bias_E = None if self.gate.bias is None else self.gate.bias.float()
        return F.linear(hidden_TD.float(), self.gate.weight.float(), bias_E)


class Experts(nn.Module):
    """The experts on this rank, one in each slot; the layout knows the logical expert of a slot."""

    def __init__(self, config: ModelConfig, num_slots: int) -> None:
        super().__init__()
        self.backend: Backend = "grouped_mm"
        self.activation = _activation(config)
        rows, hidden = rows_of_w_in(config.intermediate_size, self.activation), config.hidden_size
        self.w_in = nn.Parameter(torch.empty(num_slots, rows, hidden))
        self.w_out = nn.Parameter(torch.empty(num_slots, hidden, config.intermediate_size))
        self.b_in = nn.Parameter(torch.empty(num_slots, rows)) if config.expert_bias else None
        self.b_out = nn.Parameter(torch.empty(num_slots, hidden)) if config.expert_bias else None

    def forward(self, hidden_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum [T, D] over this rank's slots [T, K]; -1 stands for an expert on another rank."""
        w_in, w_out, b_in, b_out = (
            None if each is None else each.to(hidden_TD.dtype)
            for each in (self.w_in, self.w_out, self.b_in, self.b_out)
        )
        assert w_in is not None and w_out is not None
        return expert_mlp(
            hidden_TD, slots_TK, weights_TK, w_in, w_out, self.activation, self.backend, b_in, b_out
        )


class MoE(nn.Module):
    """Norm, gate and experts of MoE layer `index`; an MoELayout decides where tokens go."""

    def __init__(
        self, config: ModelConfig, index: int, num_slots: int, listeners: list[RoutingListener]
    ) -> None:
        super().__init__()
        self.index = index
        self.norm = _norm(config, config.hidden_size)
        self.router = Router(config)
        self.experts = Experts(config, num_slots)
        self.listeners = listeners
        self.replay: ReplayedRouting | None = None

    def route(self, normed_TD: Tensor, rows: Rows) -> Routing:
        dictated_TK = None
        if self.replay is not None:
            row_T = self.replay.row_of(rows.sequence_T, rows.position_T)
            dictated_TK = self.replay.experts(self.index, row_T)
        routing: Routing = self.router(normed_TD, dictated_TK)
        for listener in self.listeners:
            listener(
                self.index,
                routing.expert_TK,
                routing.weight_TK,
                rows.sequence_T,
                rows.position_T,
                rows.phase,
            )
        return routing


class DenseMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = _norm(config, config.hidden_size)
        self.activation = _activation(config)
        rows = rows_of_w_in(config.dense_intermediate_size, self.activation)
        self.w_in = nn.Linear(config.hidden_size, rows, bias=False)
        self.w_out = nn.Linear(config.dense_intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        out_TD: Tensor = self.w_out(self.activation(self.w_in(self.norm(hidden_TD))))
        return hidden_TD + out_TD


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, mlp: MoE | DenseMLP) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = mlp

    def forward(
        self, hidden_TD: Tensor, rows: Rows, context: AttentionContext, layout: MoELayout
    ) -> tuple[Tensor, Rows]:
        hidden_TD = self.attention(hidden_TD, rows, context)
        if isinstance(self.mlp, MoE):
            return layout.moe(self.mlp, hidden_TD, rows)
        return self.mlp(hidden_TD), rows


class Decoder(nn.Module):
    """Maps token ids to hidden states; `logits` maps chosen rows to vocabulary scores.

    num_slots: experts on this rank in each MoE layer; None means all of them, as in a single process.
    """

    def __init__(self, config: ModelConfig, num_slots: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.listeners: list[RoutingListener] = []
        slots = config.num_experts if num_slots is None else num_slots
        self.embedding = _embedding(config.vocab_size, config.hidden_size)
        self.positions = None if config.rope else _embedding(config.max_positions, config.hidden_size)
        moe_index = {layer: index for index, layer in enumerate(config.moe_layer_ids)}
        self.blocks = nn.ModuleList(
            Block(
                config,
                layer,
                MoE(config, moe_index[layer], slots, self.listeners)
                if layer in moe_index
                else DenseMLP(config),
            )
            for layer in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, config.hidden_size)
        self.head = None if config.tied_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.replay = None

    def forward(
        self, token_T: Tensor, rows: Rows, context: AttentionContext, layout: MoELayout
    ) -> tuple[Tensor, Rows]:
        hidden_TD = self.embed(token_T, rows.position_T)
        for block in self.blocks:
            hidden_TD, rows = block(hidden_TD, rows, context, layout)
        return self.norm(hidden_TD), rows

    def embed(self, token_T: Tensor, position_T: Tensor) -> Tensor:
        """Input of the first layer [T, D]: token embeddings, plus position embeddings if they are learned."""
        hidden_TD: Tensor = self.embedding(token_T)
        return hidden_TD if self.positions is None else hidden_TD + self.positions(position_T)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Vocabulary scores [T, V] float32; a tied head uses the embedding matrix."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(hidden_TD, weight.to(hidden_TD.dtype)).float()

    def routing_layout(self) -> RoutingLayout:
        """Description of the model for a trace (profiling.record.Recordable)."""
        return RoutingLayout(
            model=self.config.name,
            num_hidden_layers=self.config.num_hidden_layers,
            moe_layer_ids=self.config.moe_layer_ids,
            num_experts=self.config.num_experts,
            top_k=self.config.top_k,
        )

    @property
    def replay(self) -> ReplayedRouting | None:
        """Trace that dictates the routing; None leaves it to the gates. Assign to change it."""
        return self._replay

    @replay.setter
    def replay(self, replay: ReplayedRouting | None) -> None:
        self._replay = replay
        for module in self.modules():
            if isinstance(module, MoE):
                module.replay = replay

    def add_routing_listener(self, listener: RoutingListener) -> Callable[[], None]:
        """Call `listener` with every routing decision until the returned function is called."""
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)


def _embedding(entries: int, width: int) -> nn.Embedding:
    """An uninitialised embedding: nn.Embedding's initialisation on meta devices loads 800 modules in 2 s."""
    embedding: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(entries, width), freeze=False)
    return embedding


def initialise(decoder: Decoder, generator: torch.Generator) -> None:
    """Draw every matrix from Normal(0, initial_std)."""
    reset_vectors(decoder)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=initial_std(name, decoder.config), generator=generator)


def reset_vectors(decoder: Decoder) -> None:
    """Set norms to one, biases and sinks to zero."""
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)


def initial_std(name: str, config: ModelConfig) -> float:
    """Standard deviation as in GPT-2: 0.02, times 1/sqrt(2 * layers) for writers to the residual stream."""
    into_residual = ("attention.out.weight", "mlp.w_out", "mlp.w_out.weight", "mlp.experts.w_out")
    return 0.02 / (2 * config.num_hidden_layers) ** 0.5 if name.endswith(into_residual) else 0.02
