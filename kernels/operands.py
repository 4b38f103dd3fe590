"""Operands of the kernels of a decode step, as plain dataclasses; this file does not need Triton."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Norm = nn.LayerNorm | nn.RMSNorm


@dataclass(frozen=True)
class OffNodeBuffer:
    """The part of an exchange buffer for ranks of other nodes, with a chunk for each rank; used by relays.

    at [ranks] int64: address of the rows that arrive from a rank, 0 for ranks that send nothing here.
    payload_at: as in ExchangeBuffer. wire_bytes: bytes that `move` sends from this rank, in whole chunks.
    Chunks need no second buffer: the all-to-all runs in the stream of the kernels that write and read them.
    """

    at: Tensor
    payload_at: int
    wire_bytes: int


@dataclass(frozen=True)
class ExchangeBuffer:
    """Buffers of one exchange of an MoE layer, from this rank's view. Two buffers alternate.

    to [2, ranks] int64: address to write to for each rank, by the parity of the exchange's number. at [2]
    int64: address of arriving rows, likewise. Each sender has `chunk` bytes there, or all write into one
    chunk (`shared`). flags [peers] int32: raised by the peers. flag_addresses [peers] int64: this rank's flag
    in each peer's memory. move: runs the all-to-all that carries the rows; does nothing if peers write in
    place. payload_at: bytes from the start of a chunk, which holds numbers, to its hidden states. off_node:
    the part that goes to other nodes by relays.
    """

    to: Tensor
    at: Tensor
    chunk: int
    payload_at: int
    shared: bool
    flags: Tensor
    flag_addresses: Tensor
    move: Callable[[], None]
    off_node: OffNodeBuffer | None = None


@dataclass(frozen=True)
class Geometry:
    """The sizes of a step and its place among the ranks: constants of the kernels that exchange rows.

    rows: number of sequences that this rank may own. sequences: size of the whole batch. one_sided: peers
    write rows into this rank's memory, and kernels wait for their flags. words: number of int32 of a
    dispatched row, beside its hidden state. launch: launch keywords (wire.programmatic_launch).
    """

    rank: int
    num_ranks: int
    ranks_per_node: int
    group_size: int
    rows: int
    sequences: int
    replicated: bool
    relayed: bool
    one_sided: bool
    layers: int
    hidden_size: int
    top_k: int
    slots_per_rank: int
    words: int
    launch: dict[str, Any]

    @property
    def nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def pairs(self) -> int:
        """Number of (sequence, choice) pairs of the batch."""
        return self.sequences * self.top_k

    @property
    def constants(self) -> dict[str, Any]:
        """Keyword arguments of every kernel with an exchange."""
        return {
            **self.launch,
            "D": self.hidden_size,
            "TOP_K": self.top_k,
            "RANK": self.rank,
            "RANKS": self.num_ranks,
            "GROUP": self.group_size,
            "RANKS_PER_NODE": self.ranks_per_node,
            "BLOCK_D": power_of_2(self.hidden_size),
            "BLOCK_G": power_of_2(self.num_ranks),
        }


@dataclass(frozen=True)
class Progress:
    """Progress of this rank's exchanges, and failure of another rank.

    step [1] int64: number of steps run; with the layer it gives an exchange's number. failed [1] int32: the
    number of the exchange in which another rank's flag did not come in time, else 0.
    """

    step: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Received:
    """Tokens received by this rank in a layer, as `receive` writes them.

    normed [sequences, D]: the hidden state after the layer's norm. residual_at [sequences] int64: the address
    of the hidden state, 0 for sequences not received. owner_of [sequences] int32: the next owner, or -1.
    relay_of [sequences] int32: the token's relay in this node, or -1. weights [sequences, TOP_K] float32:
    gate weights, -1 for choices served elsewhere. pairs [slots, sequences * TOP_K] int32: the (sequence,
    choice) pairs of a slot, as sequence * TOP_K + choice. counts [slots] int32: number of pairs of a slot.
    """

    normed: Tensor
    residual_at: Tensor
    owner_of: Tensor
    relay_of: Tensor
    weights: Tensor
    pairs: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of this rank's slots, and their activation (`grouped_mlp.activation`).

    w_in [slots, W, D] and b_in [slots, W] with W = F for gelu, else 2 F; w_out [slots, D, F] and b_out
    [slots, D]. alpha, limit: constants of clamped-swiglu.
    """

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    activation: str
    alpha: float
    limit: float

    @property
    def width(self) -> int:
        """F, the inner width."""
        return self.w_out.shape[2]

    @property
    def up_constants(self) -> dict[str, Any]:
        """Keyword arguments of the kernels that apply the activation."""
        biased = self.b_in is not None
        return {"KIND": self.activation, "ALPHA": self.alpha, "LIMIT": self.limit, "BIASED": biased}


def power_of_2(size: int) -> int:
    """The least power of 2 that is at least `size`; `size` must be positive."""
    return 1 << (size - 1).bit_length()


def or_unread(value: Tensor | None, instead: Tensor) -> Tensor:
    """`value`; if the model has none, `instead`, a placeholder that the kernel does not read."""
    return instead if value is None else value


def norm_operands(norm: Norm) -> dict[str, Any]:
    """Keyword arguments of a norm for kernels. RMSNorm has no bias; kernels get its weight, and ignore it."""
    rms = isinstance(norm, nn.RMSNorm)
    bias = norm.weight if isinstance(norm, nn.RMSNorm) else norm.bias
    return {"norm_weight": norm.weight, "norm_bias": bias, "EPS": norm.eps, "RMS": rms}


def expect(dtype: torch.dtype, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Assert dtype, shape and contiguity of a kernel's tensors. A captured graph replays without checks."""
    for name, tensor in tensors.items():
        found = (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous())
        assert found == (dtype, shape, True), f"{name}: {found}, must be {dtype} {shape}, contiguous"
