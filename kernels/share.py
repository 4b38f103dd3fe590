"""Writes new keys and values, gathered from a coherence group, into the K/V cache."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exflow.kernels.operands import expect, power_of_2
from exflow.kernels.wire import after_earlier_kernels, pointer_at


@triton.jit
def scatter_new_kv_kernel(
    everyone,
    owners,
    position,
    cache,
    rows,
    positions,
    LAYERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    MEMBER: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, LAYERS). Writes a row's keys and values of a layer, if another member owned the row there.

    everyone [MEMBERS, LAYERS, rows, 2 * KV_HEADS * WIDTH]: keys before values. owners [MEMBERS, LAYERS, rows]
    int32: 1 for the member that owned the row, at most one. position [rows] int64. cache [1] int64: address
    of the cache [LAYERS, 2, rows, KV_HEADS, positions, WIDTH]; this rank's own rows are there already.
    """
    after_earlier_kernels(PDL)
    row = tl.program_id(0)
    layer = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    half: tl.constexpr = KV_HEADS * WIDTH
    exists = i < 2 * half
    side_and_head = i // WIDTH  # 0 .. 2 KV_HEADS - 1
    line = (layer * 2 + side_and_head // KV_HEADS) * rows + row
    place = (line.to(tl.int64) * KV_HEADS + side_and_head % KV_HEADS) * positions + tl.load(position + row)
    at = pointer_at(tl.load(cache), everyone.dtype) + place * WIDTH + i % WIDTH
    for member in tl.static_range(MEMBERS):
        if member != MEMBER:
            told = (member * LAYERS + layer) * rows + row
            if tl.load(owners + told) != 0:
                new = tl.load(everyone + told.to(tl.int64) * (2 * half) + i, mask=exists, other=0.0)
                tl.store(at, new, mask=exists)


def scatter_new_kv(
    *,
    everyone: Tensor,
    owners: Tensor,
    position: Tensor,
    cache: Tensor,
    positions: int,
    member: int,
    width: int,
    launch: dict[str, Any],
) -> None:
    """Launch `scatter_new_kv_kernel`. width: width of a head. positions: positions of the cache."""
    members, layers, rows, both = everyone.shape
    expect(everyone.dtype, (members, layers, rows, both), everyone=everyone)
    expect(torch.int32, (members, layers, rows), owners=owners)
    expect(torch.int64, (rows,), position=position)
    expect(torch.int64, (1,), cache=cache)
    scatter_new_kv_kernel[(rows, layers)](
        everyone=everyone,
        owners=owners,
        position=position,
        cache=cache,
        rows=rows,
        positions=positions,
        LAYERS=layers,
        MEMBERS=members,
        MEMBER=member,
        KV_HEADS=both // (2 * width),
        WIDTH=width,
        BLOCK=power_of_2(both),
        **launch,
    )
