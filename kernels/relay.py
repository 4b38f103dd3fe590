"""Relays: a token's row goes to another node once, to the rank with the owner's place there, its relay.

A relay passes the row on to the ranks of its node that serve the token. Partial sums take the way back: the
ranks of a node send theirs to the relay, which sums them and sends one row to the next owner. In its own node
the owner is the relay. Inside a node ranks write into each other's memory. Rows for another node are written
into a chunk that an all-to-all moves, where they are indexed by row. A relay keeps every row that it passes
on, so `receive` has the token's next owner even if the relay neither serves nor owns it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exflow.kernels.combine import add_sums, put_sum, sum_here
from exflow.kernels.gate import SLOTS, STAMP, put_row
from exflow.kernels.operands import ExchangeBuffer, Geometry, OffNodeBuffer, Progress, Received, expect
from exflow.kernels.wire import (
    after_earlier_kernels,
    number_of,
    pointer_at,
    row_of,
    sequence_of,
    signal,
    wait_for_all,
)


@triton.jit
def relay_tokens_kernel(
    arrived,
    buffers,
    like,
    step,
    passed,
    layer,
    layers,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS_PER_NODE: tl.constexpr,
    SLOTS_PER_RANK: tl.constexpr,
    WORDS: tl.constexpr,
    HIDDEN_AT: tl.constexpr,
    FAR_HIDDEN_AT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, nodes). Writes rows from other nodes to this rank, and to its node's ranks that serve them.

    It runs before this rank raises its flag, so the flag covers these rows too.
    arrived [RANKS] int64: address of the chunk from each rank, 0 for ranks that send none. buffers [2, RANKS]
    int64: address of each rank's buffer, by the number's parity; its rows are indexed by sequence. like: any
    tensor of the payload's type. passed [sequences] int32: incremented by the copies to other ranks of this
    node.
    """
    after_earlier_kernels(PDL)
    row = tl.program_id(0)
    source = tl.program_id(1) * RANKS_PER_NODE + RANK % RANKS_PER_NODE
    chunk = tl.load(arrived + source)
    number = number_of(step, layer, layers)
    if chunk != 0:
        word = tl.arange(0, WORDS)
        words = tl.load(pointer_at(chunk, tl.pointer_type(tl.int32)) + row * WORDS + word)
        if tl.sum(tl.where(word == STAMP, words, 0), 0) == number:
            d = tl.arange(0, BLOCK_D)
            x = tl.load(pointer_at(chunk + FAR_HIDDEN_AT, like.dtype) + row * D + d, mask=d < D, other=0.0)
            sequence = sequence_of(row, source, RANKS, GROUP)
            is_slot = (word >= SLOTS) & (word < SLOTS + TOP_K)
            hosts = tl.where(is_slot, words // SLOTS_PER_RANK, -1)
            first: tl.constexpr = RANK // RANKS_PER_NODE * RANKS_PER_NODE
            copies = 0
            for rank in tl.static_range(first, first + RANKS_PER_NODE):
                base = tl.load(buffers + number % 2 * RANKS + rank)
                if rank == RANK:
                    put_row(base, sequence, words, x, like, WORDS, HIDDEN_AT, D, BLOCK_D)
                else:
                    if tl.max((hosts == rank).to(tl.int32), 0) != 0:
                        copies += 1
                        put_row(base, sequence, words, x, like, WORDS, HIDDEN_AT, D, BLOCK_D)
            tl.store(passed + sequence, tl.load(passed + sequence) + copies)


@triton.jit
def relay_sums_kernel(
    partials,
    weights,
    owner_of,
    relay_of,
    like,
    at,
    flags,
    flag_addresses,
    failed,
    most_polls,
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
    CHUNK: tl.constexpr,
    SUMS_AT: tl.constexpr,
    FAR_SUMS_AT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (sequences,). Sums the node's partial sums of a token that this rank relays; sends the sum to its
    next owner. If this rank is the next owner, `combine_kernel` sums instead.

    at [2] int64: address of the node's partial sums, by the number's parity; rows are indexed by sequence.
    buffers [2, RANKS] int64: address of this rank's chunk at each rank of this node, likewise, and of the
    outgoing chunk for each rank of other nodes. sent [sequences, 2] int32: incremented by the copies to other
    ranks of this node and of other nodes.
    """
    after_earlier_kernels(PDL)
    sequence = tl.program_id(0)
    number = number_of(step, layer, layers)
    if sequence == 0:
        signal(flag_addresses, number, RANKS_PER_NODE, BLOCK_G)
    wait_for_all(flags, number, failed, most_polls, RANKS_PER_NODE)
    owner = tl.load(owner_of + sequence)
    if (tl.load(relay_of + sequence) == RANK) & (owner != RANK):
        d = tl.arange(0, BLOCK_D)
        in_row = d < D
        base = tl.load(at + number % 2)
        total = tl.zeros([BLOCK_D], tl.float32)
        total, says = add_sums(total, base, sequence, number, d, in_row, like, RANK % RANKS_PER_NODE,
                               RANKS_PER_NODE, CHUNK, SUMS_AT, D)  # fmt: skip
        for k in tl.static_range(TOP_K):
            says += (tl.load(weights + sequence * TOP_K + k) >= 0).to(tl.int32)
        if says > 0:
            pairs = sequences * TOP_K
            total += sum_here(partials, weights, sequence, d, in_row, pairs, D, TOP_K, SPLITS, BLOCK_D)
            far = owner // RANKS_PER_NODE != RANK // RANKS_PER_NODE
            place = tl.where(far, row_of(sequence, RANKS, GROUP), sequence)
            chunk = tl.load(buffers + number % 2 * RANKS + owner)
            sums_at = tl.where(far, FAR_SUMS_AT, SUMS_AT)
            put_sum(chunk, sums_at, place, number, total.to(like.dtype.element_ty), d, in_row, D)
            count = sent + sequence * 2 + far.to(tl.int32)
            tl.store(count, tl.load(count) + 1)


def relay_tokens(
    geometry: Geometry,
    layer: int,
    *,
    buffer: ExchangeBuffer,
    off_node: OffNodeBuffer,
    like: Tensor,
    step: Tensor,
    passed: Tensor,
) -> None:
    """Launch `relay_tokens_kernel`. off_node: rows from other nodes; buffer: buffers of this node's ranks."""
    expect(torch.int32, (geometry.sequences,), passed=passed)
    relay_tokens_kernel[(geometry.rows, geometry.nodes)](
        arrived=off_node.at,
        buffers=buffer.to,
        like=like,
        step=step,
        passed=passed,
        layer=layer,
        layers=geometry.layers,
        SLOTS_PER_RANK=geometry.slots_per_rank,
        WORDS=geometry.words,
        HIDDEN_AT=buffer.payload_at,
        FAR_HIDDEN_AT=off_node.payload_at,
        **geometry.constants,
    )


def relay_sums(
    geometry: Geometry,
    layer: int,
    *,
    partials: Tensor,
    received: Received,
    like: Tensor,
    returns: ExchangeBuffer,
    sums: ExchangeBuffer,
    off_node: OffNodeBuffer,
    progress: Progress,
    most_polls: int,
    sent: Tensor,
) -> None:
    """Launch `relay_sums_kernel`. returns: arriving partial sums; sums, off_node: buffers for the sums."""
    splits = len(partials)
    expect(torch.float32, (splits, geometry.pairs, geometry.hidden_size), partials=partials)
    expect(torch.int32, (geometry.sequences, 2), sent=sent)
    relay_sums_kernel[(geometry.sequences,)](
        partials=partials,
        weights=received.weights,
        owner_of=received.owner_of,
        relay_of=received.relay_of,
        like=like,
        at=returns.at,
        flags=returns.flags,
        flag_addresses=returns.flag_addresses,
        failed=progress.failed,
        most_polls=most_polls,
        buffers=sums.to,
        step=progress.step,
        sent=sent,
        layer=layer,
        layers=geometry.layers,
        sequences=geometry.sequences,
        CHUNK=returns.chunk,
        SUMS_AT=returns.payload_at,
        FAR_SUMS_AT=off_node.payload_at,
        SPLITS=splits,
        **geometry.constants,
    )
