"""What the kernels of a decode step share as operands. Plain dataclasses: nothing here needs Triton."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Norm = nn.LayerNorm | nn.RMSNorm


@dataclass(frozen=True)
class OffNodeBuffer:
    """The part of an exchange buffer for ranks of other nodes, which relays use: a chunk for each rank.

    at [ranks] int64: where a rank's rows arrive, 0 for ranks that send nothing here. `payload_at`: see
    ExchangeBuffer. `wire_bytes`: bytes that `move` sends from this rank, full or not.
    """

    at: Tensor
    payload_at: int
    wire_bytes: int


@dataclass(frozen=True)
class ExchangeBuffer:
    """One exchange of an MoE layer as this rank sees it.

    to [2, ranks] int64: where to write for each rank, by its number's parity; at [2] int64: where rows
    arrive. Each sender has `chunk` bytes there, or all write into one (`shared`). flags [peers] int32 are
    raised by the others and flag_addresses [peers] int64 are mine in their memory. `move` carries what was
    written, where it does not arrive by itself. `payload_at`: bytes from a chunk's beginning, where numbers
    are, to its hidden states. `off_node`: the part that goes to other nodes by relays.
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

    rows: sequences that this rank may own; sequences: those of the whole batch. one_sided: rows arrive by
    themselves, and are waited for. words: int32 of a dispatched row, beside its hidden state. launch: how
    kernels are launched (wire.programmatic_launch).
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
        """(sequence, choice) pairs of the batch."""
        return self.sequences * self.top_k

    @property
    def constants(self) -> dict[str, Any]:
        """The keywords that every kernel with an exchange takes."""
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
    """How far this rank's exchanges are, and whether a rank was given up.

    step [1] int64: steps run, from which and the layer an exchange has its number. failed [1] int32: the
    number of the exchange in which another rank was waited for in vain, else 0.
    """

    step: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Received:
    """The tokens that came to this rank in a layer, as `receive` writes them.

    normed [sequences, D]: the hidden state after the layer's norm. residual_at [sequences] int64: the address
    of the hidden state, 0 if none came. owner_of [sequences] int32: the next owner, -1 if none. relay_of
    [sequences] int32: likewise the token's relay in this node. weights [sequences, TOP_K] float32: -1 for
    choices served elsewhere. pairs [slots, sequences * TOP_K] int32: the (sequence, choice) pairs of a slot,
    as sequence * TOP_K + choice. counts [slots] int32: how many pairs a slot has.
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

    w_in [slots, W, D] and b_in [slots, W], where W is F for gelu, else 2 F; w_out [slots, D, F] and b_out
    [slots, D].
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
        """Keywords of the kernels that apply the activation."""
        biased = self.b_in is not None
        return {"KIND": self.activation, "ALPHA": self.alpha, "LIMIT": self.limit, "BIASED": biased}


def power_of_2(size: int) -> int:
    """The least power of 2 that is not below `size`, which is positive."""
    return 1 << (size - 1).bit_length()


def or_unread(value: Tensor | None, instead: Tensor) -> Tensor:
    """`value`, or what a kernel gets in place of a value that a model has not; it does not read it."""
    return instead if value is None else value


def norm_operands(norm: Norm) -> dict[str, Any]:
    """The keywords by which kernels take a norm. RMSNorm has no bias."""
    rms = isinstance(norm, nn.RMSNorm)
    bias = norm.weight if isinstance(norm, nn.RMSNorm) else norm.bias
    return {"norm_weight": norm.weight, "norm_bias": bias, "EPS": norm.eps, "RMS": rms}


def expect(dtype: torch.dtype, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Assert what a kernel takes for granted of tensors. A captured graph replays without it."""
    for name, tensor in tensors.items():
        found = (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous())
        assert found == (dtype, shape, True), f"{name}: {found}, must be {dtype} {shape}, contiguous"
