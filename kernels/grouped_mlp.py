"""Expert MLP for the few rows of a decode step: the weights of each needed expert are read once.

The bytes of the weights bound the time, so a program multiplies a tile of weights with up to BLOCK_R rows of
its slot at once. Weights are the left operand, since they have enough rows to fill a matrix unit. One kernel
computes the first product and the activation, another the second product. The second kernel splits the inner
width over programs if tiles are too few to fill the GPU; readers of the parts sum them in order.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exflow.kernels.operands import ExpertWeights, Received, expect, or_unread, power_of_2
from exflow.kernels.wire import after_earlier_kernels


@triton.jit
def product(a, b, acc):
    """acc + a @ b, without rounding of float32 operands to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def activation(x, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """gelu(x); for swiglu silu(x) * up; for clamped-swiglu the function of reference.ClampedSwiglu."""
    if KIND == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "swiglu":
        out = x / (1.0 + tl.exp(-x)) * up
    else:
        gate = tl.minimum(x, LIMIT)
        bounded = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        out = (bounded + 1.0) * gate / (1.0 + tl.exp(-ALPHA * gate))
    return out


@triton.jit
def expert_up_kernel(
    normed,
    pairs,
    counts,
    w_in,
    b_in,
    inner,
    pairs_per_slot,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (F / BLOCK_F, slots). inner[pair] = activation(normed[pair // TOP_K] @ w_in[slot].T).

    w_in [slots, F, D] if KIND is gelu, else [slots, 2 F, D], whose first half gives x of `activation`.
    BIASED: b_in [slots, F] or [slots, 2 F] is added to the product.
    """
    GATED: tl.constexpr = KIND != "gelu"
    after_earlier_kernels(PDL)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    slot = tl.program_id(1)
    count = tl.load(counts + slot)
    weights = w_in + slot.to(tl.int64) * ((2 if GATED else 1) * F * D)
    for first in range(0, count, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        pair = tl.load(pairs + slot * pairs_per_slot + r, mask=r < count, other=0)
        row = normed + (pair // TOP_K) * D
        acc = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
        up = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(row[:, None] + k[None, :], mask=(r < count)[:, None] & (k < D)[None, :], other=0.0)
            tile = f[:, None] * D + k[None, :]
            exists = (f < F)[:, None] & (k < D)[None, :]
            acc = product(tl.load(weights + tile, mask=exists, other=0.0), tl.trans(x), acc)
            if GATED:
                up = product(tl.load(weights + F * D + tile, mask=exists, other=0.0), tl.trans(x), up)
        if BIASED:
            bias = b_in + slot * ((2 if GATED else 1) * F) + f
            acc += tl.load(bias, mask=f < F, other=0.0).to(tl.float32)[:, None]
            if GATED:
                up += tl.load(bias + F, mask=f < F, other=0.0).to(tl.float32)[:, None]
        active = activation(acc, up, KIND, ALPHA, LIMIT)
        out = inner + pair[None, :] * F + f[:, None]
        tl.store(out, active.to(inner.dtype.element_ty), mask=(r < count)[None, :] & (f < F)[:, None])


@triton.jit
def expert_down_kernel(
    inner,
    pairs,
    counts,
    weight_of,
    w_out,
    b_out,
    partials,
    pairs_per_slot,
    D: tl.constexpr,
    F: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (D / BLOCK_D, slots, SPLITS). partials[split, pair] = weight_of[pair] * (a part of inner @
    w_out.T).

    w_out [slots, D, F]; weight_of [pairs] float32; partials [SPLITS, pairs, D] float32. BIASED: b_out [slots,
    D] is added to the product.
    """
    after_earlier_kernels(PDL)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = tl.program_id(1)
    split = tl.program_id(2)
    count = tl.load(counts + slot)
    weights = w_out + slot.to(tl.int64) * (D * F)
    PART: tl.constexpr = (F + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    for first in range(0, count, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        pair = tl.load(pairs + slot * pairs_per_slot + r, mask=r < count, other=0)
        row = inner + pair * F
        acc = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
        for start in range(0, PART, BLOCK_K):
            k = split * PART + start + tl.arange(0, BLOCK_K)
            x = tl.load(row[:, None] + k[None, :], mask=(r < count)[:, None] & (k < F)[None, :], other=0.0)
            exists = (d < D)[:, None] & (k < F)[None, :]
            w = tl.load(weights + d[:, None] * F + k[None, :], mask=exists, other=0.0)
            acc = product(w, tl.trans(x), acc)
        if BIASED:
            bias = tl.load(b_out + slot * D + d, mask=(d < D) & (split == 0), other=0.0)
            acc += bias.to(tl.float32)[:, None]
        gate = tl.load(weight_of + pair, mask=r < count, other=0.0)
        out = partials + (split * pairs_per_slot + pair)[None, :] * D + d[:, None]
        tl.store(out, acc * gate[None, :], mask=(r < count)[None, :] & (d < D)[:, None])


@dataclass(frozen=True)
class Tiles:
    """Tiling of one product of the experts.

    rows: rows of a slot that a program multiplies at once. wide: output columns of a program. deep: length of
    the sum in one step of its loop. splits: parts of the sum in different programs. stages: pipeline stages.
    warps: warps of a program.
    """

    rows: int
    wide: int
    deep: int
    splits: int
    stages: int
    warps: int = 4


def tiles_for(rows_per_slot: float, slots: int, width: int, depth: int, itemsize: int, gated: bool) -> Tiles:
    """Tiles for a product of [rows, depth] with [width, depth] weights in each of `slots` slots.

    Weights are read again for every `rows` rows of a slot, so the fullest slot should fit; unused rows cost
    arithmetic. Measured on an H200 (docs/log.md).
    """
    rows = min(128, max(16, power_of_2(int(rows_per_slot + 4 * rows_per_slot**0.5) or 1)))
    few, many = rows == 16, rows == 128
    wide = min(128 if many and not gated else 64, power_of_2(width))
    deep = min(256 // itemsize, power_of_2(depth))
    programs = slots * triton.cdiv(width, wide)
    splits = 1
    while programs * splits < (128 if few else 256) and splits < 8 and depth // (splits * 2) >= 4 * deep:
        splits *= 2
    stages = 4 if few or (gated and not many) else 3
    return Tiles(rows, wide, max(16, deep), splits, stages, warps=8 if many else 4)


def grouped_mlp(
    received: Received,
    experts: ExpertWeights,
    *,
    up: Tiles,
    down: Tiles,
    inner: Tensor,
    partials: Tensor,
    launch: dict[str, Any],
) -> None:
    """Launch `expert_up_kernel` and `expert_down_kernel`: the weighted outputs of the experts, in `partials`.

    inner [pairs, F] of the weights' type; partials [splits, pairs, D] float32.
    """
    (slots, pairs), top_k = received.pairs.shape, received.weights.shape[1]
    hidden_size, width = received.normed.shape[1], experts.width
    expect(inner.dtype, (pairs, width), inner=inner)
    expect(experts.w_in.dtype, (slots, experts.w_in.shape[1], hidden_size), w_in=experts.w_in)
    expect(experts.w_out.dtype, (slots, hidden_size, width), w_out=experts.w_out)
    expect(torch.float32, (down.splits, pairs, hidden_size), partials=partials)
    expert_up_kernel[(triton.cdiv(width, up.wide), slots)](
        normed=received.normed,
        pairs=received.pairs,
        counts=received.counts,
        w_in=experts.w_in,
        b_in=or_unread(experts.b_in, experts.w_in),
        inner=inner,
        pairs_per_slot=pairs,
        D=hidden_size,
        F=width,
        TOP_K=top_k,
        **experts.up_constants,
        BLOCK_F=up.wide,
        BLOCK_K=up.deep,
        BLOCK_R=up.rows,
        num_warps=up.warps,
        num_stages=up.stages,
        **launch,
    )
    expert_down_kernel[(triton.cdiv(hidden_size, down.wide), slots, down.splits)](
        inner=inner,
        pairs=received.pairs,
        counts=received.counts,
        weight_of=received.weights,
        w_out=experts.w_out,
        b_out=or_unread(experts.b_out, experts.w_out),
        partials=partials,
        pairs_per_slot=pairs,
        D=hidden_size,
        F=width,
        SPLITS=down.splits,
        BIASED=experts.b_out is not None,
        BLOCK_D=down.wide,
        BLOCK_K=down.deep,
        BLOCK_R=down.rows,
        num_warps=down.warps,
        num_stages=down.stages,
        **launch,
    )
