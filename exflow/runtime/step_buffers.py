"""The buffers of a decode step on one rank, grouped by lifetime, and the tiling of its kernels.

Shapes: B sequences of the batch, M rows of this rank, D hidden, K choices, S slots of this rank, E experts,
G ranks, L MoE layers, H query heads, C head width, F inner width. A captured graph holds the addresses of
all buffers: they are written in place and never replaced.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
import triton
from torch import Tensor

from exflow.comm.buffers import StepShape, words_of
from exflow.kernels.grouped_mlp import Tiles, tiles_for
from exflow.kernels.operands import ExpertWeights, Geometry, Progress, Received, power_of_2
from exflow.kernels.permute import Permuted, has_grouped_gemm
from exflow.kernels.wire import programmatic_launch
from exflow.model.config import ModelConfig
from exflow.model.decoder import Experts
from exflow.model.rotary import Rotary
from exflow.runtime.expert_parallel import PlanTables

MANY_ROWS = 96  # mean rows of a slot from which torch's grouped GEMM is faster than ours
MULTIPROCESSORS = 132  # SMs of an H100 or H200


def geometry_of(
    config: ModelConfig, shape: StepShape, slots: int, one_sided: bool, device: torch.device
) -> Geometry:
    """Constants of the exchange kernels. slots: number of physical experts of this rank."""
    return Geometry(
        rank=shape.rank,
        num_ranks=shape.num_ranks,
        ranks_per_node=shape.ranks_per_node,
        group_size=shape.group_size,
        rows=shape.rows,
        sequences=shape.sequences,
        replicated=shape.replicated,
        relayed=shape.relayed,
        one_sided=one_sided,
        layers=len(config.moe_layer_ids),
        hidden_size=config.hidden_size,
        top_k=config.top_k,
        slots_per_rank=slots,
        words=words_of(config.top_k),
        launch=programmatic_launch(device),
    )


def weights_of(experts: Experts, config: ModelConfig) -> ExpertWeights:
    """Weights of a layer's experts, as operands of the kernels."""
    return ExpertWeights(
        w_in=experts.w_in,
        w_out=experts.w_out,
        b_in=experts.b_in,
        b_out=experts.b_out,
        activation=config.activation,
        alpha=config.swiglu_alpha,
        limit=config.swiglu_limit,
    )


@dataclass(frozen=True)
class Tuning:
    """Tiling of the kernels; results depend on it only by rounding.

    up, down: tiles of the experts' two products. grouped_gemm: rows are permuted for torch's grouped GEMM
    instead. attention_splits: number of parts in which the K/V cache is read.
    """

    up: Tiles
    down: Tiles
    grouped_gemm: bool
    attention_splits: int

    @classmethod
    def of(
        cls, config: ModelConfig, shape: StepShape, slots: int, device: torch.device, dtype: torch.dtype
    ) -> Self:
        hidden, inner, itemsize = config.hidden_size, config.intermediate_size, dtype.itemsize
        per_slot = shape.sequences * config.top_k / config.num_experts
        up = tiles_for(per_slot, slots, inner, hidden, itemsize, config.activation != "gelu")
        down = tiles_for(per_slot, slots, hidden, inner, itemsize, False)
        grouped_gemm = per_slot >= MANY_ROWS and has_grouped_gemm(device, dtype)
        if grouped_gemm:
            down = replace(down, splits=1)
        return cls(up, down, grouped_gemm, _attention_splits(config, shape))


def _attention_splits(config: ModelConfig, shape: StepShape) -> int:
    """Number of parts in which to read the K/V cache, so that few long sequences fill the GPU."""
    owned = shape.rows if shape.replicated else triton.cdiv(shape.sequences, shape.num_ranks)
    wanted = triton.cdiv(MULTIPROCESSORS, owned * config.num_kv_heads)
    sensible = triton.cdiv(shape.positions, 128)
    return min(16, power_of_2(wanted), power_of_2(sensible))


@dataclass(frozen=True)
class Tables:
    """Constants of a step, until another placement takes over.

    serving [L, G, E] int32: the physical slot that serves an expert for each rank. next_owner [L, E, G]
    int32: score of each rank as next owner, per mille. caches [members] int64: addresses of the K/V caches to
    which new keys and values are written. end_tokens [ends + 1] int64: the tokens that end a sequence, and
    -1. cos_sin [positions, C / 2] float32 each: cosines and sines of rotary positions, if the model has them.
    """

    serving: Tensor
    next_owner: Tensor
    caches: Tensor
    end_tokens: Tensor
    cos_sin: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        positions: int,
        plan: PlanTables,
        caches: list[int],
        end_tokens: tuple[int, ...],
        device: torch.device,
    ) -> Self:
        cos_sin = None
        if config.rope is not None:
            every_position = torch.arange(positions, device=device)
            cos_sin = Rotary(config.rope, config.head_dim).turns(every_position)
        return cls(
            serving=plan.serving_slot.transpose(0, 1).contiguous().to(torch.int32),
            next_owner=plan.next_owner.to(torch.int32).contiguous(),
            caches=torch.tensor(caches, device=device),
            end_tokens=torch.tensor([*end_tokens, -1], device=device),
            cos_sin=cos_sin,
        )

    def use(self, plan: PlanTables) -> None:
        """Copy in the tables of another placement with the same number of slots."""
        self.serving.copy_(plan.serving_slot.transpose(0, 1))
        self.next_owner.copy_(plan.next_owner)


@dataclass(frozen=True)
class State:
    """State that a step takes over from the one before.

    sequence, number, token, position, dictated_row [M] int64: each row's sequence id, its prompt's number in
    the request, its newest token, that token's position, and the row of a replayed trace that dictates its
    experts. owned [M] int32: 1 if this rank owns the row. seed [] int64: seed of the request's samples.
    """

    progress: Progress
    sequence: Tensor
    number: Tensor
    token: Tensor
    position: Tensor
    dictated_row: Tensor
    owned: Tensor
    seed: Tensor

    @classmethod
    def zeros(cls, rows: int, device: torch.device) -> Self:
        def of_rows() -> Tensor:
            return torch.zeros(rows, dtype=torch.int64, device=device)

        return cls(
            progress=Progress(
                step=torch.zeros(1, dtype=torch.int64, device=device),
                failed=torch.zeros(1, dtype=torch.int32, device=device),
            ),
            sequence=of_rows(),
            number=of_rows(),
            token=of_rows(),
            position=of_rows(),
            dictated_row=of_rows(),
            owned=torch.zeros(rows, dtype=torch.int32, device=device),
            seed=torch.zeros((), dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class Workspace:
    """Buffers for intermediate results of a layer.

    hidden, normed [M, D]: the residual stream, and its norm for the next block. attended [M, H, C]: the
    output of attention. sums [M, H, splits, C] and peaks [M, H, splits, 2] float32: partial results of
    attention over parts of the K/V cache. inner [B * K, F]: the activated first product of each pair of row
    and slot. permuted: rows for torch's grouped GEMM. partials [splits, B * K, D] float32: the weighted
    outputs of experts. new_kv [layers, M, kv width] and new_kv_owned [layers, M] int32: operands of `share`,
    with 0 layers if there is none.
    """

    hidden: Tensor
    normed: Tensor
    attended: Tensor
    sums: Tensor
    peaks: Tensor
    received: Received
    inner: Tensor
    permuted: Permuted | None
    partials: Tensor
    new_kv: Tensor
    new_kv_owned: Tensor

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        geometry: Geometry,
        tuning: Tuning,
        shares_new_kv: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        rows, sequences, pairs = geometry.rows, geometry.sequences, geometry.pairs
        slots, hidden_size = geometry.slots_per_rank, geometry.hidden_size
        parts = (rows, config.num_attention_heads, tuning.attention_splits)
        layers_shared = config.num_hidden_layers if shares_new_kv else 0
        permuted = None
        if tuning.grouped_gemm:
            permuted = Permuted(
                rows=zeros(pairs, hidden_size),
                order=zeros(pairs, dtype=torch.int32),
                ends=zeros(slots, dtype=torch.int32),
            )
        return cls(
            hidden=zeros(rows, hidden_size),
            normed=zeros(rows, hidden_size),
            attended=zeros(rows, config.num_attention_heads, config.head_dim),
            sums=zeros(*parts, config.head_dim, dtype=torch.float32),
            peaks=zeros(*parts, 2, dtype=torch.float32),
            received=Received(
                normed=zeros(sequences, hidden_size),
                residual_at=zeros(sequences, dtype=torch.int64),
                owner_of=zeros(sequences, dtype=torch.int32),
                relay_of=zeros(sequences, dtype=torch.int32),
                weights=zeros(sequences, geometry.top_k, dtype=torch.float32),
                pairs=zeros(slots, pairs, dtype=torch.int32),
                counts=zeros(slots, dtype=torch.int32),
            ),
            inner=zeros(pairs, config.intermediate_size),
            permuted=permuted,
            partials=zeros(tuning.down.splits, pairs, hidden_size, dtype=torch.float32),
            new_kv=zeros(layers_shared, rows, config.kv_width),
            new_kv_owned=zeros(layers_shared, rows, dtype=torch.int32),
        )


@dataclass(frozen=True)
class Outputs:
    """Results that the host reads after steps.

    Latest step: routing [L, M, K] int32, -1 for rows not owned; routing_weight [L, M, K] float32.
    Since the request began: done [1] int64, number of steps run; chosen [positions, M] int64, their tokens,
    -1 if the row was not owned; int32 counters dispatched [M, 2] and returned [B, 2], copies sent to ranks of
    this node and of other nodes; passed [B], copies sent as a relay; attended [M], tokens with attention.
    """

    routing: Tensor
    routing_weight: Tensor
    done: Tensor
    chosen: Tensor
    dispatched: Tensor
    returned: Tensor
    passed: Tensor
    attended: Tensor

    @classmethod
    def zeros(cls, geometry: Geometry, positions: int, device: torch.device) -> Self:
        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        rows, sequences = geometry.rows, geometry.sequences
        choices = (geometry.layers, rows, geometry.top_k)
        return cls(
            routing=zeros(*choices),
            routing_weight=zeros(*choices, dtype=torch.float32),
            done=zeros(1, dtype=torch.int64),
            chosen=zeros(positions, rows, dtype=torch.int64),
            dispatched=zeros(rows, 2),
            returned=zeros(sequences, 2),
            passed=zeros(sequences),
            attended=zeros(rows),
        )

    def clear(self) -> None:
        """Reset all results for a new request."""
        self.chosen.fill_(-1)
        for count in (self.done, self.dispatched, self.returned, self.passed, self.attended):
            count.zero_()
