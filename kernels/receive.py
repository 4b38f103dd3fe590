"""Receive: wait for all flags, repeat the norm of received rows, and list each slot's rows for the experts.

The first programs handle one sequence each, the others one slot each. Both read the words of the rows
themselves, so neither waits for the other.
"""

import torch
import triton
import triton.language as tl

from exflow.kernels.gate import OWNER, SLOTS, STAMP
from exflow.kernels.operands import (
    ExchangeBuffer,
    Geometry,
    Norm,
    Progress,
    Received,
    expect,
    norm_operands,
    power_of_2,
)
from exflow.kernels.wire import (
    after_earlier_kernels,
    normalise,
    number_of,
    pointer_at,
    row_of,
    signal,
    wait_for_all,
)


@triton.jit
def chunk_of(base, sequence, source: tl.constexpr, CHUNK: tl.constexpr, RANKS: tl.constexpr,
             GROUP: tl.constexpr, BY_SEQUENCE: tl.constexpr):  # fmt: skip
    """Address of the chunk of the `source`-th rank that may have sent this sequence."""
    return base if BY_SEQUENCE else base + (sequence % RANKS // GROUP * GROUP + source) * CHUNK


@triton.jit
def _take_row(base, sequence, number, d, w, b, normed, residual_at, owner_of, relay_of, weights,
              D: tl.constexpr, TOP_K: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
              GROUP: tl.constexpr, RANKS_PER_NODE: tl.constexpr, SLOTS_PER_RANK: tl.constexpr,
              WORDS: tl.constexpr, HIDDEN_AT: tl.constexpr, CHUNK: tl.constexpr, BY_SEQUENCE: tl.constexpr,
              RELAYED: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):  # fmt: skip
    """Write the fields of `operands.Received` for one sequence, whether its row was received or not."""
    SOURCES: tl.constexpr = 1 if BY_SEQUENCE else GROUP
    place = sequence if BY_SEQUENCE else row_of(sequence, RANKS, GROUP)
    address = base * 0
    for source in tl.static_range(SOURCES):
        chunk = chunk_of(base, sequence, source, CHUNK, RANKS, GROUP, BY_SEQUENCE)
        stamp = tl.load(chunk.to(tl.pointer_type(tl.int32)) + place * WORDS + STAMP)
        address = tl.where(stamp == number, chunk, address)
    if address == 0:
        tl.store(residual_at + sequence, address)
        tl.store(owner_of + sequence, -1)
        if RELAYED:
            tl.store(relay_of + sequence, -1)
        for k in tl.static_range(TOP_K):
            tl.store(weights + sequence * TOP_K + k, -1.0)
    else:
        row_bytes: tl.constexpr = D * (normed.dtype.element_ty.primitive_bitwidth // 8)
        row_at = address + HIDDEN_AT + place * row_bytes
        in_row = d < D
        x = tl.load(pointer_at(row_at, normed.dtype) + d, mask=in_row, other=0.0).to(tl.float32)
        out = normalise(x, in_row, w, b, D, EPS, RMS)
        tl.store(normed + sequence * D + d, out.to(normed.dtype.element_ty), mask=in_row)
        words = address.to(tl.pointer_type(tl.int32)) + place * WORDS
        tl.store(residual_at + sequence, row_at)
        owner = tl.load(words + OWNER)
        if RELAYED:
            tl.store(relay_of + sequence, RANK // RANKS_PER_NODE * RANKS_PER_NODE + owner // RANKS)
            owner = owner % RANKS
        tl.store(owner_of + sequence, owner)
        for k in tl.static_range(TOP_K):
            host = tl.load(words + SLOTS + k) // SLOTS_PER_RANK
            weight = tl.load(words + SLOTS + TOP_K + k).to(tl.float32, bitcast=True)
            tl.store(weights + sequence * TOP_K + k, tl.where(host == RANK, weight, -1.0))


@triton.jit
def _list_slot(base, slot, number, pairs, counts, sequences, TOP_K: tl.constexpr, RANK: tl.constexpr,
               RANKS: tl.constexpr, GROUP: tl.constexpr, SLOTS_PER_RANK: tl.constexpr, WORDS: tl.constexpr,
               CHUNK: tl.constexpr, BY_SEQUENCE: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """List the received (sequence, choice) pairs of one slot, ordered by source, choice, sequence."""
    SOURCES: tl.constexpr = 1 if BY_SEQUENCE else GROUP
    sequence = tl.arange(0, BLOCK_B)
    exists = sequence < sequences
    place = sequence if BY_SEQUENCE else row_of(sequence, RANKS, GROUP)
    found = 0
    for source in tl.static_range(SOURCES):
        chunk = chunk_of(base, sequence, source, CHUNK, RANKS, GROUP, BY_SEQUENCE)
        words = chunk.to(tl.pointer_type(tl.int32)) + place * WORDS
        came = tl.load(words + STAMP, mask=exists, other=-1) == number
        for k in tl.static_range(TOP_K):
            wanted = tl.load(words + SLOTS + k, mask=exists, other=-1)
            match = (came & (wanted == RANK * SLOTS_PER_RANK + slot)).to(tl.int32)
            at = pairs + slot * sequences * TOP_K + found + tl.cumsum(match, 0) - 1
            tl.store(at, sequence * TOP_K + k, mask=match != 0)
            found += tl.sum(match, 0)
    tl.store(counts + slot, found)


@triton.jit
def receive_kernel(
    buffers,
    flags,
    flag_addresses,
    failed,
    most_polls,
    step,
    norm_weight,
    norm_bias,
    normed,
    residual_at,
    owner_of,
    relay_of,
    weights,
    pairs,
    counts,
    layer,
    layers,
    sequences,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS_PER_NODE: tl.constexpr,
    SLOTS_PER_RANK: tl.constexpr,
    WORDS: tl.constexpr,
    HIDDEN_AT: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    RELAYED: tl.constexpr,
    WAIT: tl.constexpr,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (sequences + SLOTS_PER_RANK,).

    buffers [2] int64: address of arriving rows, by the number's parity. Writes the fields of
    `operands.Received`; relay_of only with RELAYED. With WAIT it raises the flags of this exchange, and reads
    rows after all flags (docs/decode.md).
    """
    PEERS: tl.constexpr = RANKS_PER_NODE if RELAYED else RANKS
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(norm_weight + d, mask=d < D, other=0.0)
    b = tl.load(norm_bias + d, mask=d < D, other=0.0)
    after_earlier_kernels(PDL)
    number = number_of(step, layer, layers)
    base = tl.load(buffers + number % 2)
    if WAIT:
        if program == 0:
            signal(flag_addresses, number, PEERS, BLOCK_G)
        wait_for_all(flags, number, failed, most_polls, PEERS)
    if program < sequences:
        _take_row(base, program, number, d, w, b, normed, residual_at, owner_of, relay_of, weights, D, TOP_K,
                  RANK, RANKS, GROUP, RANKS_PER_NODE, SLOTS_PER_RANK, WORDS, HIDDEN_AT, CHUNK, BY_SEQUENCE,
                  RELAYED, EPS, RMS)  # fmt: skip
    else:
        _list_slot(base, program - sequences, number, pairs, counts, sequences, TOP_K, RANK, RANKS,
                   GROUP, SLOTS_PER_RANK, WORDS, CHUNK, BY_SEQUENCE, BLOCK_B)  # fmt: skip


def receive(
    geometry: Geometry,
    layer: int,
    *,
    buffer: ExchangeBuffer,
    norm: Norm,
    received: Received,
    progress: Progress,
    most_polls: int,
) -> None:
    """Launch `receive_kernel`. Rows of replicated tokens are this rank's own, and need no wait."""
    sequences, slots, top_k = geometry.sequences, geometry.slots_per_rank, geometry.top_k
    expect(received.normed.dtype, (sequences, geometry.hidden_size), normed=received.normed)
    expect(torch.int64, (sequences,), residual_at=received.residual_at)
    expect(torch.int32, (sequences,), owner_of=received.owner_of, relay_of=received.relay_of)
    expect(torch.float32, (sequences, top_k), weights=received.weights)
    expect(torch.int32, (slots, geometry.pairs), pairs=received.pairs)
    expect(torch.int32, (slots,), counts=received.counts)
    receive_kernel[(sequences + slots,)](
        buffers=buffer.at,
        flags=buffer.flags,
        flag_addresses=buffer.flag_addresses,
        failed=progress.failed,
        most_polls=most_polls,
        step=progress.step,
        **norm_operands(norm),
        normed=received.normed,
        residual_at=received.residual_at,
        owner_of=received.owner_of,
        relay_of=received.relay_of,
        weights=received.weights,
        pairs=received.pairs,
        counts=received.counts,
        layer=layer,
        layers=geometry.layers,
        sequences=sequences,
        SLOTS_PER_RANK=slots,
        WORDS=geometry.words,
        HIDDEN_AT=buffer.payload_at,
        CHUNK=buffer.chunk,
        BY_SEQUENCE=buffer.shared,
        RELAYED=geometry.relayed,
        WAIT=geometry.one_sided and not geometry.replicated,
        BLOCK_B=power_of_2(sequences),
        **geometry.constants,
    )
