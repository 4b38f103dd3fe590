"""Combine: partial sums go to the tokens' next owners, which add them to the residual stream.

A row of partial sums is stored in two regions of the receiver's buffer: its exchange's number, and the sum.
Every sender has a chunk of its own there, so sums are added in a fixed order and no two ranks write to one
address. With relays (relay.py) a row goes to the token's relay in this node, which sends the sum to the next
owner.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exflow.kernels.operands import ExchangeBuffer, Geometry, Norm, Progress, Received, expect, norm_operands
from exflow.kernels.wire import (
    after_earlier_kernels,
    normalise,
    number_of,
    pointer_at,
    row_of,
    sequence_of,
    signal,
    wait_for_all,
)


@triton.jit
def sum_here(partials, weights, sequence, d, in_row, pairs, D: tl.constexpr, TOP_K: tl.constexpr,
             SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The weighted outputs of a token's experts on this rank, summed over choices and splits, float32."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(TOP_K):
        pair = sequence * TOP_K + k
        here = (tl.load(weights + pair) >= 0).to(tl.int32) != 0
        for split in tl.static_range(SPLITS):
            part = partials + (split * pairs + pair) * D + d
            total += tl.load(part, mask=in_row & here, other=0.0)
    return total


@triton.jit
def add_sums(total, base, place, number, d, in_row, like, ME: tl.constexpr, PEERS: tl.constexpr,
             CHUNK: tl.constexpr, SUMS_AT: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Add one row's sums from the peers' chunks to `total`, float32; return it and the number of senders."""
    senders = 0
    for peer in tl.static_range(PEERS):
        if peer != ME:
            chunk = base + peer * CHUNK
            came = tl.load(chunk.to(tl.pointer_type(tl.int32)) + place) == number
            sums = pointer_at(chunk + SUMS_AT, like.dtype) + place * D + d
            total += tl.load(sums, mask=in_row & came, other=0.0).to(tl.float32)
            senders += came.to(tl.int32)
    return total, senders


@triton.jit
def put_sum(chunk, sums_at, place, number, value, d, in_row, D: tl.constexpr):
    """Store one row of sums and the exchange's number in a chunk. value [BLOCK_D], of the payload's type."""
    tl.store(chunk.to(tl.pointer_type(tl.int32)) + place, number)
    sums = pointer_at(chunk + sums_at, tl.pointer_type(value.dtype))
    tl.store(sums + place * D + d, value, mask=in_row)


@triton.jit
def send_partials_kernel(
    partials,
    weights,
    owner_of,
    relay_of,
    like,
    buffers,
    step,
    sent,
    layer,
    layers,
    sequences,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS_PER_NODE: tl.constexpr,
    SUMS_AT: tl.constexpr,
    RELAYED: tl.constexpr,
    REPLICATED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (sequences,). Sends this rank's partial sum of a token to its next owner.

    REPLICATED: to all ranks instead. RELAYED: to the token's relay in this node, with rows of the buffers
    indexed by sequence.
    buffers [2, RANKS] int64: address of this rank's chunk at each rank, by the number's parity. like: any
    tensor of the payload's type. sent [sequences, 2] int32: incremented by the copies to other ranks of this
    node and of other nodes.
    """
    after_earlier_kernels(PDL)
    sequence = tl.program_id(0)
    number = number_of(step, layer, layers)
    owner = tl.load(owner_of + sequence)
    receiver = tl.load(relay_of + sequence) if RELAYED else owner
    here = 0
    for k in tl.static_range(TOP_K):
        here += (tl.load(weights + sequence * TOP_K + k) >= 0).to(tl.int32)
    if (here > 0) & (REPLICATED or owner != RANK):
        d = tl.arange(0, BLOCK_D)
        in_row = d < D
        pairs = sequences * TOP_K
        total = sum_here(partials, weights, sequence, d, in_row, pairs, D, TOP_K, SPLITS, BLOCK_D)
        value = total.to(like.dtype.element_ty)
        row = sequence if RELAYED else row_of(sequence, RANKS, GROUP)
        for rank in tl.static_range(RANKS):
            if rank != RANK and (REPLICATED or receiver == rank):
                base = tl.load(buffers + number % 2 * RANKS + rank)
                put_sum(base, SUMS_AT, row, number, value, d, in_row, D)
                near = 0 if rank // RANKS_PER_NODE == RANK // RANKS_PER_NODE else 1
                count = sent + sequence * 2 + near
                tl.store(count, tl.load(count) + 1)


@triton.jit
def combine_kernel(
    partials,
    weights,
    residual_at,
    owner_of,
    relay_of,
    buffers,
    arrived,
    flags,
    flag_addresses,
    failed,
    most_polls,
    step,
    norm_weight,
    norm_bias,
    hidden,
    normed,
    owned,
    layer,
    layers,
    sequences,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS_PER_NODE: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMS_AT: tl.constexpr,
    FAR_SUMS_AT: tl.constexpr,
    RELAYED: tl.constexpr,
    RETURNS: tl.constexpr,
    WAIT: tl.constexpr,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows,). hidden[row] = residual + every rank's partial sum, for the rows that this rank owns next.

    With RETURNS and WAIT the flags are raised first, and rows are read after all flags (docs/decode.md).
    normed [rows, D]: the norm of `hidden`, for the next layer. owned [rows] int32: replaced. buffers [2]
    int64: address of arriving partial sums, by the number's parity. RELAYED: arrived [RANKS] int64 is the
    address of arriving sums from relays of other nodes, 0 for the ranks of this node.
    """
    PEERS: tl.constexpr = RANKS_PER_NODE if RELAYED else RANKS
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    w = tl.load(norm_weight + d, mask=in_row, other=0.0)
    b = tl.load(norm_bias + d, mask=in_row, other=0.0)
    after_earlier_kernels(PDL)
    number = number_of(step, layer, layers)
    if RETURNS and WAIT:
        if row == 0:
            signal(flag_addresses, number, PEERS, BLOCK_G)
        wait_for_all(flags, number, failed, most_polls, PEERS)
    sequence = sequence_of(row, RANK, RANKS, GROUP)
    mine = tl.load(owner_of + sequence) == RANK
    tl.store(owned + row, mine.to(tl.int32))
    if mine:
        address = tl.load(residual_at + sequence)
        x = tl.load(pointer_at(address, hidden.dtype) + d, mask=in_row, other=0.0).to(tl.float32)
        pairs = sequences * TOP_K
        x += sum_here(partials, weights, sequence, d, in_row, pairs, D, TOP_K, SPLITS, BLOCK_D)
        if RETURNS:
            base = tl.load(buffers + number % 2)
            place = sequence if RELAYED else row
            x, _ = add_sums(x, base, place, number, d, in_row, hidden, RANK % PEERS, PEERS, CHUNK, SUMS_AT,
                            D)  # fmt: skip
            if RELAYED:
                relay = tl.load(relay_of + sequence) % RANKS_PER_NODE
                for first in tl.static_range(0, RANKS, RANKS_PER_NODE):
                    if first != RANK // RANKS_PER_NODE * RANKS_PER_NODE:
                        chunk = tl.load(arrived + first + relay)
                        came = tl.load(chunk.to(tl.pointer_type(tl.int32)) + row) == number
                        sums = pointer_at(chunk + FAR_SUMS_AT, hidden.dtype) + row * D + d
                        x += tl.load(sums, mask=in_row & came, other=0.0).to(tl.float32)
        rounded = x.to(hidden.dtype.element_ty)
        tl.store(hidden + row * D + d, rounded, mask=in_row)
        wide = tl.where(in_row, rounded.to(tl.float32), 0.0)
        out = normalise(wide, in_row, w, b, D, EPS, RMS)
        tl.store(normed + row * D + d, out.to(normed.dtype.element_ty), mask=in_row)


def send_partials(
    geometry: Geometry,
    layer: int,
    *,
    partials: Tensor,
    received: Received,
    like: Tensor,
    buffer: ExchangeBuffer,
    step: Tensor,
    sent: Tensor,
) -> None:
    """Launch `send_partials_kernel`: partial sums of this rank's experts go to next owners or relays."""
    splits = len(partials)
    expect(torch.float32, (splits, geometry.pairs, geometry.hidden_size), partials=partials)
    expect(torch.int32, (geometry.sequences, 2), sent=sent)
    send_partials_kernel[(geometry.sequences,)](
        partials=partials,
        weights=received.weights,
        owner_of=received.owner_of,
        relay_of=received.relay_of,
        like=like,
        buffers=buffer.to,
        step=step,
        sent=sent,
        layer=layer,
        layers=geometry.layers,
        sequences=geometry.sequences,
        SUMS_AT=buffer.payload_at,
        RELAYED=geometry.relayed,
        REPLICATED=geometry.replicated,
        SPLITS=splits,
        **geometry.constants,
    )


def combine(
    geometry: Geometry,
    layer: int,
    *,
    partials: Tensor,
    received: Received,
    buffer: ExchangeBuffer,
    returns: bool,
    norm: Norm,
    hidden: Tensor,
    normed: Tensor,
    owned: Tensor,
    progress: Progress,
    most_polls: int,
) -> None:
    """Launch `combine_kernel`. returns: True if partial sums arrive in `buffer`; else it is not read.

    With relays and groups of one rank it does not wait: the owner is the relay, and `relay_sums` has waited.
    """
    rows, splits = geometry.rows, len(partials)
    expect(torch.float32, (splits, geometry.pairs, geometry.hidden_size), partials=partials)
    expect(hidden.dtype, (rows, geometry.hidden_size), hidden=hidden, normed=normed)
    expect(torch.int32, (rows,), owned=owned)
    combine_kernel[(rows,)](
        partials=partials,
        weights=received.weights,
        residual_at=received.residual_at,
        owner_of=received.owner_of,
        relay_of=received.relay_of,
        buffers=buffer.at,
        arrived=buffer.off_node.at if buffer.off_node else buffer.at,
        flags=buffer.flags,
        flag_addresses=buffer.flag_addresses,
        failed=progress.failed,
        most_polls=most_polls,
        step=progress.step,
        **norm_operands(norm),
        hidden=hidden,
        normed=normed,
        owned=owned,
        layer=layer,
        layers=geometry.layers,
        sequences=geometry.sequences,
        CHUNK=buffer.chunk,
        SUMS_AT=buffer.payload_at,
        FAR_SUMS_AT=buffer.off_node.payload_at if buffer.off_node else 0,
        RELAYED=geometry.relayed,
        RETURNS=returns,
        WAIT=geometry.one_sided and not (geometry.relayed and geometry.group_size == 1),
        SPLITS=splits,
        **geometry.constants,
    )
