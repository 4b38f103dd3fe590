"""Grouped GEMM path of the experts, for many rows a slot: rows are permuted into slot order, and back.

The products are torch's, and their shapes are static. The three kernels skip rows beyond the received ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import grouped_mm

from exflow.kernels.grouped_mlp import activation
from exflow.kernels.operands import ExpertWeights, Received, expect, or_unread, power_of_2
from exflow.kernels.wire import after_earlier_kernels, is_sm90

INNER_BLOCK = 1024  # inner columns that a program activates


@triton.jit
def slot_of(row, ends, SLOTS: tl.constexpr, BLOCK_S: tl.constexpr):
    """The slot of a row, given the ends of all slots; SLOTS if the row is beyond all of them."""
    s = tl.arange(0, BLOCK_S)
    return tl.sum((tl.load(ends + s, mask=s < SLOTS, other=1 << 30) <= row).to(tl.int32), 0)


@triton.jit
def permute_kernel(
    normed,
    pairs,
    counts,
    rows,
    order,
    ends,
    pairs_per_slot,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs,). rows[i] = normed[pair // TOP_K] for the pairs of slot 0, then of slot 1, ...

    pairs [slots, pairs] int32 and counts [slots] int32 as in `operands.Received`. order [pairs] int32: the
    pair of each row; ends [slots] int32: the end of each slot's rows.
    """
    after_earlier_kernels(PDL)
    i = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    count_of = tl.load(counts + s, mask=s < SLOTS, other=0)
    end_of = tl.cumsum(count_of, 0)
    if i == 0:
        tl.store(ends + s, end_of, mask=s < SLOTS)
    slot = tl.sum(((end_of <= i) & (s < SLOTS)).to(tl.int32), 0)
    if slot < SLOTS:
        within = i - tl.sum(tl.where(s < slot, count_of, 0), 0)
        pair = tl.load(pairs + slot * pairs_per_slot + within)
        d = tl.arange(0, BLOCK_D)
        row = tl.load(normed + pair // TOP_K * D + d, mask=d < D)
        tl.store(rows + i * D + d, row, mask=d < D)
        tl.store(order + i, pair)


@triton.jit
def activate_kernel(
    products,
    b_in,
    inner,
    ends,
    F: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BIASED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, F / BLOCK_F). inner [pairs, F] = activation of products [pairs, F] or [pairs, 2 F].

    Activation and biases are as in `expert_up_kernel`.
    """
    after_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(ends + SLOTS - 1):
        W: tl.constexpr = F if KIND == "gelu" else 2 * F
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        x = tl.load(products + row * W + f, mask=f < F, other=0.0).to(tl.float32)
        up = tl.load(products + row * W + W - F + f, mask=f < F, other=0.0).to(tl.float32)
        if BIASED:
            bias = b_in + slot_of(row, ends, SLOTS, BLOCK_S) * W + f
            x += tl.load(bias, mask=f < F, other=0.0).to(tl.float32)
            up += tl.load(bias + W - F, mask=f < F, other=0.0).to(tl.float32)
        out = activation(x, up, KIND, ALPHA, LIMIT)
        tl.store(inner + row * F + f, out.to(inner.dtype.element_ty), mask=f < F)


@triton.jit
def unpermute_kernel(
    outputs,
    order,
    ends,
    weight_of,
    b_out,
    partials,
    D: tl.constexpr,
    BIASED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs,). partials[pair] = weight_of[pair] * outputs[row of the pair].

    BIASED: b_out [slots, D] is added to the row. partials [pairs, D] float32.
    """
    after_earlier_kernels(PDL)
    row = tl.program_id(0)
    if row < tl.load(ends + SLOTS - 1):
        pair = tl.load(order + row)
        d = tl.arange(0, BLOCK_D)
        out = tl.load(outputs + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        if BIASED:
            bias = b_out + slot_of(row, ends, SLOTS, BLOCK_S) * D + d
            out += tl.load(bias, mask=d < D, other=0.0).to(tl.float32)
        tl.store(partials + pair * D + d, out * tl.load(weight_of + pair), mask=d < D)


@dataclass(frozen=True)
class Permuted:
    """The rows of all slots in slot order.

    rows [pairs, D]; order [pairs] int32: the pair of each row; ends [slots] int32: the end of a slot's rows.
    """

    rows: Tensor
    order: Tensor
    ends: Tensor


def has_grouped_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """True if torch's grouped products run without reading sizes on the host."""
    return device.type == "cpu" or (dtype == torch.bfloat16 and is_sm90(device))


def permuted_mlp(
    received: Received,
    experts: ExpertWeights,
    *,
    permuted: Permuted,
    inner: Tensor,
    partials: Tensor,
    launch: dict[str, Any],
) -> None:
    """Launch the three kernels and the two grouped GEMMs between them. Result as `grouped_mlp`, one split."""
    (slots, pairs), top_k = received.pairs.shape, received.weights.shape[1]
    hidden_size, width = received.normed.shape[1], experts.width
    expect(received.normed.dtype, (pairs, hidden_size), rows=permuted.rows)
    expect(torch.int32, (pairs,), order=permuted.order)
    expect(torch.int32, (slots,), ends=permuted.ends)
    expect(inner.dtype, (pairs, width), inner=inner)
    expect(torch.float32, (1, pairs, hidden_size), partials=partials)
    over_slots = {"SLOTS": slots, "BLOCK_S": power_of_2(slots), **launch}
    block_d = power_of_2(hidden_size)
    permute_kernel[(pairs,)](
        normed=received.normed,
        pairs=received.pairs,
        counts=received.counts,
        rows=permuted.rows,
        order=permuted.order,
        ends=permuted.ends,
        pairs_per_slot=pairs,
        D=hidden_size,
        TOP_K=top_k,
        BLOCK_D=block_d,
        **over_slots,
    )
    activate_kernel[(pairs, triton.cdiv(width, INNER_BLOCK))](
        products=grouped_mm(permuted.rows, experts.w_in.mT, offs=permuted.ends),
        b_in=or_unread(experts.b_in, experts.w_in),
        inner=inner,
        ends=permuted.ends,
        F=width,
        **experts.up_constants,
        BLOCK_F=INNER_BLOCK,
        **over_slots,
    )
    unpermute_kernel[(pairs,)](
        outputs=grouped_mm(inner, experts.w_out.mT, offs=permuted.ends),
        order=permuted.order,
        ends=permuted.ends,
        weight_of=received.weights,
        b_out=or_unread(experts.b_out, experts.w_out),
        partials=partials,
        D=hidden_size,
        BIASED=experts.b_out is not None,
        BLOCK_D=block_d,
        **over_slots,
    )
