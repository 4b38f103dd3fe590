"""Attention of a decode step: one new token of each sequence, over the sequence's K/V cache.

Rows that this rank does not own are skipped, so only the caches of its own tokens are read. While it reads
them, this kernel writes new keys and values into the caches of the whole coherence group. So each member can
own the token in the next step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exflow.kernels.grouped_mlp import product
from exflow.kernels.operands import expect, or_unread, power_of_2
from exflow.kernels.wire import after_earlier_kernels, pointer_at


@triton.jit
def _over_the_past(q, new_k, new_v, sink, keys, side, begin, end, with_new, scale, SINKS: tl.constexpr,
                   WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """Attention of the queries [BLOCK_Q, BLOCK_C] of one key head over positions begin to end.

    Returns the largest score and the sum of exponentials [BLOCK_Q], and the unnormalised output [BLOCK_Q,
    BLOCK_C], all float32. with_new: the new token is seen too. SINKS: sink [BLOCK_Q] joins the scores.
    """
    c = tl.arange(0, BLOCK_C)
    # the new token and the sink belong to the first part
    first = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    peak = tl.where(with_new, first, float("-inf"))
    mass = tl.where(with_new, tl.full([BLOCK_Q], 1.0, tl.float32), 0.0)
    acc = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32) + tl.where(with_new, new_v.to(tl.float32), 0.0)[None, :]
    if SINKS:
        peak = tl.where(with_new, tl.maximum(first, sink), float("-inf"))
        kept = tl.where(with_new, tl.exp(first - peak), 0.0)
        mass = kept + tl.where(with_new, tl.exp(sink - peak), 0.0)
        acc = acc * kept[:, None]
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        tile = p[:, None] * WIDTH + c[None, :]
        exists = (p < end)[:, None] & (c < WIDTH)[None, :]
        k = tl.load(keys + tile, mask=exists, other=0.0)
        v = tl.load(keys + side + tile, mask=exists, other=0.0)
        score = product(q, tl.trans(k), tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)) * scale
        score = tl.where((p < end)[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        odds = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        mass = mass * shrink + tl.sum(odds, 1)
        acc = product(odds.to(v.dtype), v, acc * shrink[:, None])
        peak = higher
    return peak, mass, acc


@triton.jit
def decode_attention_kernel(
    qkv,
    owned,
    position,
    caches,
    out,
    sums,
    peaks,
    attended,
    new_kv,
    new_kv_owned,
    sinks,
    layer,
    rows,
    positions,
    window,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    MEMBER: tl.constexpr,
    MEMBERS: tl.constexpr,
    SPLITS: tl.constexpr,
    NEW_KV: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, KV_HEADS, SPLITS).

    qkv [rows, (HEADS + 2 KV_HEADS) * WIDTH]; owned [rows] int32; position [rows] int64 of the new token;
    caches [MEMBERS] int64: address of each member's cache [layers, 2, rows, KV_HEADS, positions, WIDTH];
    MEMBER: index of this rank; out [rows, HEADS, WIDTH]. A token sees the last `window` positions, its own
    included. SINKS: sinks [HEADS] join the scores and add no value. SPLITS > 1: the cache is read in parts,
    and sums [rows, HEADS, SPLITS, WIDTH] and peaks [rows, HEADS, SPLITS, 2] float32 are written, to be
    merged. attended [rows] int32: incremented for owned rows. NEW_KV: new_kv [layers, rows, 2 KV_HEADS *
    WIDTH] gets the new keys and values of owned rows, and new_kv_owned [layers, rows] int32 marks these rows.
    """
    after_earlier_kernels(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    mine = tl.load(owned + row)
    if NEW_KV and (head == 0) & (split == 0):
        tl.store(new_kv_owned + layer * rows + row, mine)
    if mine != 0:
        PER_KV: tl.constexpr = HEADS // KV_HEADS
        c = tl.arange(0, BLOCK_C)
        in_head = c < WIDTH
        q_of = tl.arange(0, BLOCK_Q)
        line = qkv + row * ((HEADS + 2 * KV_HEADS) * WIDTH)
        both = (q_of < PER_KV)[:, None] & in_head[None, :]
        q = tl.load(line + (head * PER_KV + q_of)[:, None] * WIDTH + c[None, :], mask=both, other=0.0)
        new_k = tl.load(line + (HEADS + head) * WIDTH + c, mask=in_head, other=0.0)
        new_v = tl.load(line + (HEADS + KV_HEADS + head) * WIDTH + c, mask=in_head, other=0.0)

        past = tl.load(position + row).to(tl.int32)
        side = tl.full([], KV_HEADS * WIDTH, tl.int64) * rows * positions
        keys_at = layer * 2 * side + (row.to(tl.int64) * KV_HEADS + head) * positions * WIDTH
        if split == 0:
            for member in tl.static_range(MEMBERS):
                base = pointer_at(tl.load(caches + member), qkv.dtype)
                tl.store(base + keys_at + past * WIDTH + c, new_k, mask=in_head)
                tl.store(base + keys_at + side + past * WIDTH + c, new_v, mask=in_head)

            if NEW_KV:
                told = new_kv + ((layer * rows + row).to(tl.int64) * (2 * KV_HEADS) + head) * WIDTH + c
                tl.store(told, new_k, mask=in_head)
                tl.store(told + KV_HEADS * WIDTH, new_v, mask=in_head)
        if (head == 0) & (split == 0):
            tl.store(attended + row, tl.load(attended + row) + 1)

        keys = pointer_at(tl.load(caches + MEMBER), qkv.dtype) + keys_at
        low = tl.maximum(past + 1 - window, 0)
        part = tl.cdiv(tl.cdiv(past - low, SPLITS), BLOCK_P) * BLOCK_P
        begin, end = low + split * part, tl.minimum(past, low + (split + 1) * part)
        h = head * PER_KV + q_of
        sink = tl.zeros([BLOCK_Q], tl.float32)
        if SINKS:
            sink = tl.load(sinks + h, mask=q_of < PER_KV, other=0.0).to(tl.float32)
        peak, mass, acc = _over_the_past(
            q, new_k, new_v, sink, keys, side, begin, end, split == 0, scale, SINKS, WIDTH, BLOCK_P, BLOCK_Q,
            BLOCK_C,
        )  # fmt: skip

        if SPLITS == 1:
            at = out + (row * HEADS + h)[:, None] * WIDTH + c[None, :]
            tl.store(at, (acc / mass[:, None]).to(out.dtype.element_ty), mask=both)
        else:
            cell = (row * HEADS + h) * SPLITS + split
            tl.store(sums + cell[:, None] * WIDTH + c[None, :], acc, mask=both)
            tl.store(peaks + cell * 2, peak, mask=q_of < PER_KV)
            tl.store(peaks + cell * 2 + 1, mass, mask=q_of < PER_KV)


@triton.jit
def merge_splits_kernel(
    owned, sums, peaks, out,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows, HEADS). Merges the parts in `sums` and `peaks` of `decode_attention_kernel` into `out`."""
    after_earlier_kernels(PDL)
    row = tl.program_id(0)
    if tl.load(owned + row) != 0:
        cell = (row * HEADS + tl.program_id(1)) * SPLITS
        s = tl.arange(0, SPLITS)
        c = tl.arange(0, BLOCK_C)
        peak = tl.load(peaks + (cell + s) * 2)
        share = tl.exp(peak - tl.max(peak, 0))
        mass = tl.sum(share * tl.load(peaks + (cell + s) * 2 + 1), 0)
        acc = tl.load(sums + (cell + s)[:, None] * WIDTH + c[None, :], mask=(c < WIDTH)[None, :], other=0.0)
        merged = tl.sum(acc * share[:, None], 0) / mass
        at = out + (row * HEADS + tl.program_id(1)) * WIDTH + c
        tl.store(at, merged.to(out.dtype.element_ty), mask=c < WIDTH)


def decode_attention(
    layer: int,
    *,
    qkv: Tensor,
    owned: Tensor,
    position: Tensor,
    caches: Tensor,
    member: int,
    positions: int,
    window: int | None,
    sinks: Tensor | None,
    out: Tensor,
    sums: Tensor,
    peaks: Tensor,
    attended: Tensor,
    new_kv: Tensor,
    new_kv_owned: Tensor,
    launch: dict[str, Any],
) -> None:
    """Launch `decode_attention_kernel`, and `merge_splits_kernel` if `sums` has several parts.

    positions: number of positions of a cache. member: index of this rank's cache. new_kv: has 0 layers if
    all caches can be written to.
    """
    rows, heads, splits, width = sums.shape
    kv_heads = (qkv.shape[1] // width - heads) // 2
    expect(qkv.dtype, (rows, (heads + 2 * kv_heads) * width), qkv=qkv)
    expect(qkv.dtype, (rows, heads, width), out=out)
    expect(torch.int32, (rows,), owned=owned, attended=attended)
    expect(torch.int64, (rows,), position=position)
    expect(torch.float32, (rows, heads, splits, width), sums=sums)
    expect(torch.float32, (rows, heads, splits, 2), peaks=peaks)
    expect(qkv.dtype, (len(new_kv), rows, 2 * kv_heads * width), new_kv=new_kv)
    expect(torch.int32, (len(new_kv), rows), new_kv_owned=new_kv_owned)
    block_c = max(16, power_of_2(width))
    decode_attention_kernel[(rows, kv_heads, splits)](
        qkv=qkv,
        owned=owned,
        position=position,
        caches=caches,
        out=out,
        sums=sums,
        peaks=peaks,
        attended=attended,
        new_kv=new_kv,
        new_kv_owned=new_kv_owned,
        sinks=or_unread(sinks, peaks),
        layer=layer,
        rows=rows,
        positions=positions,
        window=window or positions,
        scale=width**-0.5,
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        MEMBER=member,
        MEMBERS=len(caches),
        SPLITS=splits,
        NEW_KV=len(new_kv) > 0,
        SINKS=sinks is not None,
        BLOCK_P=min(64, 8192 // block_c),
        BLOCK_Q=max(16, power_of_2(heads // kv_heads)),
        BLOCK_C=block_c,
        num_warps=2,
        **launch,
    )
    if splits > 1:
        merge_splits_kernel[(rows, heads)](
            owned=owned,
            sums=sums,
            peaks=peaks,
            out=out,
            HEADS=heads,
            WIDTH=width,
            SPLITS=splits,
            BLOCK_C=block_c,
            **launch,
        )
