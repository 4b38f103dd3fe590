"""Attention of a decode step: one new token a sequence, over the keys and values of its past.

Rows that this rank does not own are skipped, so the bytes read are those of its own tokens. The new keys and
values go into the caches of the whole coherence group from here: each member is ready to own the token in the
next step, and the rows travel while the past is read.
"""

import triton
import triton.language as tl

from exflow.kernels.grouped_mlp import product
from exflow.kernels.wire import after_earlier_kernels, pointer_at


@triton.jit
def _over_the_past(q, new_k, new_v, sink, keys, side, begin, end, with_new, scale, SINKS: tl.constexpr,
                   WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """The queries [BLOCK_Q, BLOCK_C] that share a key head, over its past: peak, mass [BLOCK_Q], sums,
    float32. SINKS: sink [BLOCK_Q] joins the scores."""
    c = tl.arange(0, BLOCK_C)
    # the new token itself belongs to the first part, and so does the sink
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
def decode_attention(
    qkv,
    owned,
    position,
    caches,
    out,
    sums,
    peaks,
    attended,
    born,
    born_owned,
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
    BORN: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, KV_HEADS, SPLITS).

    qkv [rows, (HEADS + 2 KV_HEADS) * WIDTH]; owned [rows] int32; position [rows] int64 of the new token;
    caches [MEMBERS] int64, the address of each member's cache [layers, 2, rows, KV_HEADS, positions, WIDTH],
    MEMBER this rank's; out [rows, HEADS, WIDTH]. A token sees `window` positions, its own the last; where
    SINKS, sinks [HEADS] join the scores and add no value. With SPLITS > 1 the past is cut into parts: sums
    [rows, HEADS, SPLITS, WIDTH] and peaks [rows, HEADS, SPLITS, 2] float32 are written, for `merge_splits`.
    attended [rows] int32 counts the tokens run here. Where BORN, born [layers, rows, 2 KV_HEADS * WIDTH] gets
    the owned rows' new keys and values, and born_owned [layers, rows] int32 says which those are.
    """
    after_earlier_kernels(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    mine = tl.load(owned + row)
    if BORN and (head == 0) & (split == 0):
        tl.store(born_owned + layer * rows + row, mine)
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

            if BORN:
                told = born + ((layer * rows + row).to(tl.int64) * (2 * KV_HEADS) + head) * WIDTH + c
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
def merge_splits(
    owned, sums, peaks, out,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows, HEADS). Joins the parts of the past that `decode_attention` left in `sums` and `peaks`."""
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
