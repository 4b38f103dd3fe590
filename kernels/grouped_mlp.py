"""The expert MLP for the few rows of a decode step: each needed expert's weights are read once.

Bound by the bytes of the weights, so a program holds a tile of weights against all rows of its slot at once,
up to BLOCK_R; the weights are the left operand of the product, since they have rows enough to fill a matrix
unit. Two kernels: the first product and the activation, then the second product. The second splits the inner
width over programs where tiles are too few to fill the GPU; the parts are summed, in order, by whoever reads
them.
"""

import triton
import triton.language as tl

from exflow.kernels.wire import after_earlier_kernels


@triton.jit
def product(a, b, acc):
    """acc + a @ b: exact products of float32, and of what float32 holds exactly."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def expert_up(
    normed,
    pairs,
    counts,
    w_in,
    inner,
    pairs_per_slot,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (F / BLOCK_F, slots). inner[pair] = activation(normed[pair // TOP_K] @ w_in[slot].T).

    w_in [slots, F, D], or [slots, 2 F, D] where GATED (silu of the first half times the second); else GELU.
    """
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
        if GATED:
            active = acc / (1.0 + tl.exp(-acc)) * up
        else:
            active = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
        out = inner + pair[None, :] * F + f[:, None]
        tl.store(out, active.to(inner.dtype.element_ty), mask=(r < count)[None, :] & (f < F)[:, None])


@triton.jit
def expert_down(
    inner,
    pairs,
    counts,
    weight_of,
    w_out,
    partials,
    pairs_per_slot,
    D: tl.constexpr,
    F: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (D / BLOCK_D, slots, SPLITS). partials[split, pair] = weight_of[pair] * (a part of inner @
    w_out.T).

    w_out [slots, D, F]; weight_of [pairs] float32; partials [SPLITS, pairs, D] float32.
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
        gate = tl.load(weight_of + pair, mask=r < count, other=0.0)
        out = partials + (split * pairs_per_slot + pair)[None, :] * D + d[:, None]
        tl.store(out, acc * gate[None, :], mask=(r < count)[None, :] & (d < D)[:, None])
