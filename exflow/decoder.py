"""The one decoder: its modules know neither the K/V cache nor the other ranks.

Two collaborators, handed to `forward`, supply what differs between training, a single process and a rank of
many: an `AttentionContext` knows where keys and values live, an `MoELayout` where experts live. Because a
token may leave this rank in an MoE layer, a forward pass carries `Rows`, the identity of the tokens at hand.

Shapes: T tokens at hand, D hidden, H query heads, J key/value heads, C head width, K choices, E experts,
S expert slots held here, F inner width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exflow.config import ModelConfig
from exflow.kernels.experts import Backend, expert_mlp
from exflow.kernels.reference import Activation, rows_of_w_in, swiglu
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.record import RoutingListener
from exflow.replay import ReplayedRouting

ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "swiglu": swiglu}


@dataclass(frozen=True)
class Rows:
    """Which tokens the rows of the hidden state are: sequence id and position [T] int64, and the phase."""

    sequence_T: Tensor
    position_T: Tensor
    phase: int


@dataclass(frozen=True)
class Routing:
    """The gate's choice: logical expert ids [T, K] int64, best first, and their weights [T, K] float32."""

    expert_TK: Tensor
    weight_TK: Tensor
    probability_TE: Tensor


class AttentionContext(Protocol):
    def attend(self, layer: int, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        """Store the new keys and values, return the attention output [T, H, C]."""


class MoELayout(Protocol):
    def moe(self, layer: "MoE", hidden_TD: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """Add the layer's output to the residual stream; the rows returned are those now at hand."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.widths = [config.attention_width, config.kv_width // 2, config.kv_width // 2]
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.out = nn.Linear(config.attention_width, config.hidden_size, bias=False)

    def forward(self, hidden_TD: Tensor, rows: Rows, context: AttentionContext) -> Tensor:
        parts = self.qkv(self.norm(hidden_TD)).split(self.widths, dim=-1)
        q_THC, k_TJC, v_TJC = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        attended_THC = context.attend(self.layer, q_THC, k_TJC, v_TJC, rows)
        out_TD: Tensor = self.out(attended_THC.flatten(1))
        return hidden_TD + out_TD


class Router(nn.Module):
    """Top-1 keeps its softmax probability as weight (Switch); top-k shares one among the chosen (GShard).

    Where experts are dictated the gate still weighs them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden_TD: Tensor, expert_TK: Tensor | None = None) -> Routing:
        """expert_TK: the experts to take [T, K] int64; None means the likeliest."""
        logits_TE = F.linear(hidden_TD.float(), self.gate.weight.float())
        probability_TE = logits_TE.softmax(dim=-1)
        if expert_TK is None:
            expert_TK = probability_TE.topk(self.top_k, dim=-1).indices
        if self.top_k == 1:
            weight_TK = probability_TE.gather(1, expert_TK)
        else:  # not a quotient of probabilities: those of dictated experts may all have vanished
            weight_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
        return Routing(expert_TK, weight_TK, probability_TE)


class Experts(nn.Module):
    """The experts held here, one a slot; which logical expert a slot holds is the layout's business."""

    def __init__(self, config: ModelConfig, num_slots: int) -> None:
        super().__init__()
        self.backend: Backend = "grouped_mm"
        self.activation = ACTIVATIONS[config.activation]
        rows = rows_of_w_in(config.intermediate_size, self.activation)
        self.w_in = nn.Parameter(torch.empty(num_slots, rows, config.hidden_size))
        self.w_out = nn.Parameter(torch.empty(num_slots, config.hidden_size, config.intermediate_size))

    def forward(self, hidden_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum over the slots held here; -1 stands for an expert held elsewhere."""
        w_in, w_out = self.w_in.to(hidden_TD.dtype), self.w_out.to(hidden_TD.dtype)
        return expert_mlp(hidden_TD, slots_TK, weights_TK, w_in, w_out, self.activation, self.backend)


class MoE(nn.Module):
    """Norm, gate and experts of MoE layer `index`; a layout decides what runs where (see moe.py)."""

    def __init__(
        self, config: ModelConfig, index: int, num_slots: int, listeners: list[RoutingListener]
    ) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(config.hidden_size)
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
        self.norm = nn.LayerNorm(config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        rows = rows_of_w_in(config.intermediate_size, self.activation)
        self.w_in = nn.Linear(config.hidden_size, rows, bias=False)
        self.w_out = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

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
    """Token ids in, hidden states out; `logits` turns the rows one cares about into vocabulary scores.

    num_slots: experts held by this rank in each MoE layer (all of them in a single process).
    """

    def __init__(self, config: ModelConfig, num_slots: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.listeners: list[RoutingListener] = []
        slots = config.num_experts if num_slots is None else num_slots
        self.embedding = _embedding(config.vocab_size, config.hidden_size)
        self.positions = _embedding(config.max_positions, config.hidden_size)
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
        self.norm = nn.LayerNorm(config.hidden_size)
        self.replay = None

    def forward(
        self, token_T: Tensor, rows: Rows, context: AttentionContext, layout: MoELayout
    ) -> tuple[Tensor, Rows]:
        hidden_TD = self.embedding(token_T) + self.positions(rows.position_T)
        for block in self.blocks:
            hidden_TD, rows = block(hidden_TD, rows, context, layout)
        return self.norm(hidden_TD), rows

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Vocabulary scores [T, V] in float32; the output matrix is the embedding (tied)."""
        return F.linear(hidden_TD, self.embedding.weight.to(hidden_TD.dtype)).float()

    def routing_layout(self) -> RoutingLayout:
        """What a trace says about the model (profiling.record.Recordable)."""
        return RoutingLayout(
            model=self.config.name,
            num_hidden_layers=self.config.num_hidden_layers,
            moe_layer_ids=self.config.moe_layer_ids,
            num_experts=self.config.num_experts,
            top_k=self.config.top_k,
        )

    @property
    def replay(self) -> ReplayedRouting | None:
        """What dictates the routing; None leaves it to the gates. Assign to change it."""
        return self._replay

    @replay.setter
    def replay(self, replay: ReplayedRouting | None) -> None:
        self._replay = replay
        for module in self.modules():
            if isinstance(module, MoE):
                module.replay = replay

    def add_routing_listener(self, listener: RoutingListener) -> Callable[[], None]:
        """Call `listener` with every routing decision until the function returned is called."""
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)


def _embedding(entries: int, width: int) -> nn.Embedding:
    """Not yet initialised: on the meta device nn.Embedding's own way to do it loads 800 modules, in 2 s."""
    embedding: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(entries, width), freeze=False)
    return embedding


def initialise(decoder: Decoder, generator: torch.Generator) -> None:
    """Draw every matrix from Normal(0, initial_std)."""
    for name, parameter in decoder.named_parameters():
        if parameter.dim() >= 2:  # norms keep their ones and zeros
            nn.init.normal_(parameter, std=initial_std(name, decoder.config), generator=generator)


def initial_std(name: str, config: ModelConfig) -> float:
    """0.02 as GPT-2; for matrices that write to the residual stream scaled by 1/sqrt(2 * layers)."""
    into_residual = ("attention.out.weight", "mlp.w_out", "mlp.w_out.weight", "mlp.experts.w_out")
    return 0.02 / (2 * config.num_hidden_layers) ** 0.5 if name.endswith(into_residual) else 0.02
