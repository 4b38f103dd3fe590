"""Norms, bounds and rotary positions of queries, keys and values before attention, in place."""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from exflow.kernels.operands import Norm, expect, norm_operands, power_of_2
from exflow.kernels.wire import after_earlier_kernels, scaled


@triton.jit
def prepare_heads_kernel(
    qkv,
    owned,
    position,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    cosines,
    sines,
    clip,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    RMS: tl.constexpr,
    EPS: tl.constexpr,
    CLIP: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, 2), or with CLIP (rows, 3): the queries of an owned row, its keys, and its values.

    qkv [rows, (HEADS + 2 KV_HEADS) * WIDTH]; owned [rows] int32; position [rows] int64. As in
    decoder.Attention, norm, bound and rotation follow each other. NORM: none, head (weights and biases
    [WIDTH]) or width ([HEADS * WIDTH] and [KV_HEADS * WIDTH]). CLIP: queries, keys and values are bounded by
    +-clip. ROTARY: numbers p and p + WIDTH / 2 of a head are rotated by cosines and sines [positions,
    WIDTH / 2] float32.
    """
    after_earlier_kernels(PDL)
    row = tl.program_id(0)
    part = tl.program_id(1)
    if tl.load(owned + row) != 0:
        HALF: tl.constexpr = (WIDTH + 1) // 2
        heads = HEADS if part == 0 else KV_HEADS
        before = 0 if part == 0 else HEADS + (part - 1) * KV_HEADS
        h = tl.arange(0, BLOCK_H)[:, None]
        p = tl.arange(0, BLOCK_P)[None, :]
        in_a = (h < heads) & (p < HALF)
        in_b = (h < heads) & (p + HALF < WIDTH)
        at = qkv + (row * (HEADS + 2 * KV_HEADS) + before + h) * WIDTH + p
        a = tl.load(at, mask=in_a, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=in_b, other=0.0).to(tl.float32)
        if NORM != "none":  # noqa: SIM102 - the compile-time condition comes first
            if part < 2:
                w = q_weight if part == 0 else k_weight
                shift = q_bias if part == 0 else k_bias
                place = p if NORM == "head" else h * WIDTH + p
                size = WIDTH if NORM == "head" else heads * WIDTH
                mean = tl.zeros([BLOCK_H, 1], tl.float32)
                if not RMS:
                    mean += _over(a + b, NORM) / size
                squares = tl.where(in_a, (a - mean) * (a - mean), 0.0)
                squares += tl.where(in_b, (b - mean) * (b - mean), 0.0)
                scale = 1.0 / tl.sqrt(_over(squares, NORM) / size + EPS)
                w_a = tl.load(w + place, mask=in_a, other=0.0)
                w_b = tl.load(w + place + HALF, mask=in_b, other=0.0)
                s_a = tl.load(shift + place, mask=in_a, other=0.0)
                s_b = tl.load(shift + place + HALF, mask=in_b, other=0.0)
                a = scaled(a, mean, scale, w_a, s_a, RMS).to(qkv.dtype.element_ty).to(tl.float32)
                b = scaled(b, mean, scale, w_b, s_b, RMS).to(qkv.dtype.element_ty).to(tl.float32)
        if CLIP:
            a = tl.minimum(tl.maximum(a, -clip), clip)
            b = tl.minimum(tl.maximum(b, -clip), clip)
        if ROTARY:  # noqa: SIM102
            if part < 2:
                angle = tl.load(position + row) * HALF + p
                cos = tl.load(cosines + angle, mask=p < HALF, other=0.0)
                sin = tl.load(sines + angle, mask=p < HALF, other=0.0)
                turned = a * cos - b * sin
                b = b * cos + a * sin
                a = turned
        tl.store(at, a.to(qkv.dtype.element_ty), mask=in_a)
        tl.store(at + HALF, b.to(qkv.dtype.element_ty), mask=in_b)


@triton.jit
def _over(x, NORM: tl.constexpr):
    """The sum over each head [BLOCK_H, 1], or over all heads [1, 1]."""
    each = tl.sum(x, 1)[:, None]
    return each if NORM == "head" else tl.sum(each, 0)[None, :]


def prepare_heads(
    qkv: Tensor,
    *,
    owned: Tensor,
    position: Tensor,
    heads: int,
    kv_heads: int,
    width: int,
    q_norm: Norm | None,
    k_norm: Norm | None,
    norm_over: Literal["head", "width"] | None,
    clip: float | None,
    cos_sin: tuple[Tensor, Tensor] | None,
    launch: dict[str, Any],
) -> None:
    """Launch `prepare_heads_kernel`, if the model has norms, a bound or rotary positions.

    q_norm, k_norm: both or none, over each head or the whole width (norm_over). cos_sin [positions, width
    / 2] float32 each: cosines and sines.
    """
    if q_norm is None and k_norm is None and clip is None and cos_sin is None:
        return
    rows = len(qkv)
    expect(qkv.dtype, (rows, (heads + 2 * kv_heads) * width), qkv=qkv)
    expect(torch.int32, (rows,), owned=owned)
    expect(torch.int64, (rows,), position=position)
    of_q, of_k = ({} if norm is None else norm_operands(norm) for norm in (q_norm, k_norm))
    cosines, sines = cos_sin or (qkv, qkv)  # without ROTARY these are not read
    prepare_heads_kernel[(rows, 2 if clip is None else 3)](
        qkv=qkv,
        owned=owned,
        position=position,
        q_weight=of_q.get("norm_weight", qkv),
        q_bias=of_q.get("norm_bias", qkv),
        k_weight=of_k.get("norm_weight", qkv),
        k_bias=of_k.get("norm_bias", qkv),
        cosines=cosines,
        sines=sines,
        clip=clip or 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        NORM=norm_over or "none",
        RMS=of_q.get("RMS", False),
        EPS=of_q.get("EPS", 0.0),
        CLIP=clip is not None,
        ROTARY=cos_sin is not None,
        BLOCK_H=power_of_2(heads),
        BLOCK_P=power_of_2(-(-width // 2)),
        **launch,
    )
