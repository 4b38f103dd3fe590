"""Gate and dispatch: norm, gate, choice of experts and next owner, and writes to the ranks that serve a row.

Each row that the rank may own has one program. A row on the wire has two parts, in two regions of the
receiver's buffer: WORDS int32 (the exchange's number, the next owner, the physical slots, the bits of the
gate weights) and the hidden state before the layer. The receiver repeats the norm, so only the residual
stream travels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from exflow.kernels.operands import (
    ExchangeBuffer,
    Geometry,
    Norm,
    expect,
    norm_operands,
    or_unread,
    power_of_2,
)
from exflow.kernels.wire import after_earlier_kernels, moments, number_of, pointer_at, scaled, sequence_of

# words of a row; the gate weights follow the slots
STAMP: tl.constexpr = tl.constexpr(0)
OWNER: tl.constexpr = tl.constexpr(1)
SLOTS: tl.constexpr = tl.constexpr(2)


@triton.jit
def put_row(base, place, words, x, like, WORDS: tl.constexpr, HIDDEN_AT: tl.constexpr, D: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """Store one row at `place` of a buffer: words [WORDS] and hidden state x [BLOCK_D], of like's type."""
    word = tl.arange(0, WORDS)
    d = tl.arange(0, BLOCK_D)
    tl.store(pointer_at(base, tl.pointer_type(tl.int32)) + place * WORDS + word, words)
    tl.store(pointer_at(base + HIDDEN_AT, like.dtype) + place * D + d, x, mask=d < D)


@triton.jit
def gate_and_dispatch_kernel(
    hidden,
    owned,
    norm_weight,
    norm_bias,
    gate,
    gate_bias,
    serving,
    next_owner,
    dictated,
    dictated_row,
    routing,
    routing_weight,
    buffers,
    step,
    sent,
    layer,
    layers,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS_PER_NODE: tl.constexpr,
    SLOTS_PER_RANK: tl.constexpr,
    WORDS: tl.constexpr,
    HIDDEN_AT: tl.constexpr,
    FAR_HIDDEN_AT: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    RELAYED: tl.constexpr,
    REPLICATED: tl.constexpr,
    REPLAY: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    AMONG_ALL: tl.constexpr,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STRIP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows,). Writes an owned row to every rank that serves the token, and to this rank if it keeps it.

    hidden [rows, D]; owned [rows] int32; gate [EXPERTS, D]; gate_bias [EXPERTS] with GATE_BIAS; serving
    [RANKS, EXPERTS] int32: physical slot that serves an expert for each rank; next_owner [EXPERTS, RANKS]
    int32; with REPLAY dictated [tokens, layers, TOP_K] int64 and dictated_row [rows] int64. Written: routing
    [rows, TOP_K] int32, -1 for rows not owned, and routing_weight [rows, TOP_K] float32. buffers [2, RANKS]
    int64: address to write to for each rank, by the number's parity. step [1] int64. sent [rows, 2] int32:
    incremented by the copies to other ranks of this node and of other nodes. BY_SEQUENCE: rows of the buffers
    are indexed by sequence, else by row. AMONG_ALL: weights are probabilities among all experts, else among
    the chosen ones. RELAYED: each other node gets one row, indexed by row, for the relay there (relay.py).
    """
    # all loads with known addresses come before any computation, so that their latencies overlap
    row = tl.program_id(0)
    sequence = sequence_of(row, RANK, RANKS, GROUP)
    home = sequence % RANKS
    asks = home if REPLICATED else RANK
    ranks = tl.arange(0, BLOCK_G)
    e = tl.arange(0, BLOCK_E)
    c = tl.arange(0, STRIP)
    first = (e[:, None] < EXPERTS) & (c < D)[None, :]
    strip = tl.load(gate + e[:, None] * D + c[None, :], mask=first, other=0.0)
    w = tl.load(norm_weight + c, mask=c < D, other=0.0)
    b = tl.load(norm_bias + c, mask=c < D, other=0.0)
    slots = tl.load(serving + asks * EXPERTS + e, mask=e < EXPERTS, other=0)
    both = (e[:, None] < EXPERTS) & (ranks < RANKS)[None, :]
    likely_next = tl.load(next_owner + e[:, None] * RANKS + ranks[None, :], mask=both, other=0)
    number = number_of(step, layer, layers)
    addresses = tl.load(buffers + number % 2 * RANKS + ranks, mask=ranks < RANKS, other=0)
    after_earlier_kernels(PDL)
    if tl.load(owned + row) != 0:
        d = tl.arange(0, BLOCK_D)
        in_row = d < D
        x = tl.load(hidden + row * D + d, mask=in_row, other=0.0)
        mean, scale = moments(x.to(tl.float32), in_row, D, EPS, RMS)
        terms = tl.zeros([BLOCK_E, STRIP], tl.float32)
        for start in tl.static_range(0, D, STRIP):
            if start > 0:
                c = start + tl.arange(0, STRIP)
                rest = (e[:, None] < EXPERTS) & (c < D)[None, :]
                strip = tl.load(gate + e[:, None] * D + c[None, :], mask=rest, other=0.0)
                w = tl.load(norm_weight + c, mask=c < D, other=0.0)
                b = tl.load(norm_bias + c, mask=c < D, other=0.0)
            part = tl.load(hidden + row * D + c, mask=c < D, other=0.0).to(tl.float32)
            normed = scaled(part, mean, scale, w, b, RMS)
            terms += strip.to(tl.float32) * normed.to(x.dtype).to(tl.float32)[None, :]
        logits = tl.sum(terms, 1)
        if GATE_BIAS:
            logits += tl.load(gate_bias + e, mask=e < EXPERTS, other=0.0).to(tl.float32)
        logits = tl.where(e < EXPERTS, logits, float("-inf"))
        odds = tl.exp(logits - tl.max(logits, 0))
        probability = odds / tl.sum(odds, 0)

        # the chosen experts, the words of the row, the ranks that serve it, and the candidates for next owner
        word = tl.arange(0, WORDS)
        words = tl.zeros([WORDS], tl.int32)
        scores = tl.zeros([WORDS], tl.float32)
        hosts = tl.zeros([BLOCK_G], tl.int32)
        likely = tl.zeros([BLOCK_G], tl.int32)
        left = logits
        for k in tl.static_range(TOP_K):
            if REPLAY:
                at = (tl.load(dictated_row + row).to(tl.int64) * layers + layer) * TOP_K + k
                expert = tl.load(dictated + at).to(tl.int32)
            else:
                expert = tl.argmax(left, 0)
            score = tl.sum(tl.where(e == expert, probability if AMONG_ALL else logits, 0.0), 0)
            left = tl.where(e == expert, float("-inf"), left)
            slot = tl.sum(tl.where(e == expert, slots, 0), 0)
            tl.store(routing + row * TOP_K + k, expert)
            hosts = tl.where(ranks == slot // SLOTS_PER_RANK, 1, hosts)
            likely += tl.sum(tl.where((e == expert)[:, None], likely_next, 0), 0)
            words = tl.where(word == SLOTS + k, slot, words)
            scores = tl.where(word == SLOTS + TOP_K + k, score, scores)
        is_weight = (word >= SLOTS + TOP_K) & (word < SLOTS + 2 * TOP_K)
        if not AMONG_ALL:
            odds = tl.where(
                is_weight, tl.exp(scores - tl.max(tl.where(is_weight, scores, float("-inf")), 0)), 0.0
            )
            scores = odds / tl.sum(odds, 0)
        words = tl.where(is_weight, scores.to(tl.int32, bitcast=True), words)
        tl.store(routing_weight + row * TOP_K + word - SLOTS - TOP_K, scores, mask=is_weight)

        owner = RANK
        if not REPLICATED:
            candidates = (hosts != 0) & (ranks // GROUP == home // GROUP)
            score = tl.where(candidates, likely * RANKS - ranks, -2147483648)
            if tl.max(score, 0) > -2147483648:
                owner = tl.argmax(score, 0)
        words = tl.where(word == STAMP, number, words)
        words = tl.where(word == OWNER, owner + RANK % RANKS_PER_NODE * RANKS if RELAYED else owner, words)

        within = 0
        beyond = 0
        place = sequence if BY_SEQUENCE else row
        for rank in tl.static_range(RANKS):
            if RELAYED and rank // RANKS_PER_NODE != RANK // RANKS_PER_NODE:
                if rank % RANKS_PER_NODE == RANK % RANKS_PER_NODE:  # the token's relay there
                    there = ranks // RANKS_PER_NODE == rank // RANKS_PER_NODE
                    if tl.sum(tl.where(there, hosts, 0), 0) != 0:
                        beyond += 1
                        base = tl.sum(tl.where(ranks == rank, addresses, 0), 0)
                        put_row(base, row, words, x, hidden, WORDS, FAR_HIDDEN_AT, D, BLOCK_D)
            else:
                serves = tl.sum(tl.where(ranks == rank, hosts, 0), 0) != 0
                if rank == RANK:
                    wanted = serves | (owner == RANK) | RELAYED  # the owner is the relay in its node
                else:
                    wanted = serves and not REPLICATED
                    if wanted:
                        if rank // RANKS_PER_NODE == RANK // RANKS_PER_NODE:
                            within += 1
                        else:
                            beyond += 1
                if wanted:
                    base = tl.sum(tl.where(ranks == rank, addresses, 0), 0)
                    put_row(base, place, words, x, hidden, WORDS, HIDDEN_AT, D, BLOCK_D)
        if not REPLICATED:
            tl.store(sent + row * 2, tl.load(sent + row * 2) + within)
            tl.store(sent + row * 2 + 1, tl.load(sent + row * 2 + 1) + beyond)
    else:
        for k in tl.static_range(TOP_K):
            tl.store(routing + row * TOP_K + k, -1)


def gate_and_dispatch(
    geometry: Geometry,
    layer: int,
    *,
    hidden: Tensor,
    owned: Tensor,
    norm: Norm,
    gate: nn.Linear,
    among_all: bool,
    serving: Tensor,
    next_owner: Tensor,
    dictated: Tensor | None,
    dictated_row: Tensor,
    routing: Tensor,
    routing_weight: Tensor,
    buffer: ExchangeBuffer,
    step: Tensor,
    sent: Tensor,
) -> None:
    """Launch `gate_and_dispatch_kernel`. dictated: the experts of a replayed trace, or None."""
    rows, (experts, _) = geometry.rows, gate.weight.shape
    expect(hidden.dtype, (rows, geometry.hidden_size), hidden=hidden)
    expect(gate.weight.dtype, (experts, geometry.hidden_size), gate=gate.weight)
    expect(torch.int32, (rows,), owned=owned)
    expect(torch.int32, (geometry.num_ranks, experts), serving=serving)
    expect(torch.int32, (experts, geometry.num_ranks), next_owner=next_owner)
    expect(torch.int64, (rows,), dictated_row=dictated_row)
    expect(torch.int32, (rows, geometry.top_k), routing=routing)
    expect(torch.float32, (rows, geometry.top_k), routing_weight=routing_weight)
    expect(torch.int32, (rows, 2), sent=sent)
    block_e = power_of_2(experts)
    gate_and_dispatch_kernel[(rows,)](
        hidden=hidden,
        owned=owned,
        **norm_operands(norm),
        gate=gate.weight,
        gate_bias=or_unread(gate.bias, gate.weight),
        serving=serving,
        next_owner=next_owner,
        dictated=or_unread(dictated, owned),
        dictated_row=dictated_row,
        routing=routing,
        routing_weight=routing_weight,
        buffers=buffer.to,
        step=step,
        sent=sent,
        layer=layer,
        layers=geometry.layers,
        EXPERTS=experts,
        SLOTS_PER_RANK=geometry.slots_per_rank,
        WORDS=geometry.words,
        HIDDEN_AT=buffer.payload_at,
        FAR_HIDDEN_AT=buffer.off_node.payload_at if buffer.off_node else 0,
        BY_SEQUENCE=buffer.shared,
        RELAYED=geometry.relayed,
        REPLICATED=geometry.replicated,
        REPLAY=dictated is not None,
        GATE_BIAS=gate.bias is not None,
        AMONG_ALL=among_all,
        BLOCK_E=block_e,
        STRIP=min(power_of_2(geometry.hidden_size), 1024 if block_e <= 16 else 256),
        num_warps=4 if block_e <= 16 else 8,
        **geometry.constants,
    )
