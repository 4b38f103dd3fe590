"""Functions shared by the kernels of a decode step: rows and sequences, flags between ranks, norms.

A rank may own the sequences of its coherence group: row i of its hidden states is sequence `sequence_of(i)`
of the batch. Ranks write into each other's memory and then raise a flag: one int32 for each sender, which
holds the number of the sender's latest exchange. Numbers only grow, so old rows and flags need no clearing.
docs/decode.md lists the invariants that keep a row from being overwritten before it is read.
"""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def sequence_of(row, RANK: tl.constexpr, RANKS: tl.constexpr, GROUP: tl.constexpr):
    """Index in the batch of a row's sequence; the home of sequence b is rank b % RANKS."""
    return row // GROUP * RANKS + RANK // GROUP * GROUP + row % GROUP


@triton.jit
def row_of(sequence, RANKS: tl.constexpr, GROUP: tl.constexpr):
    """Row of a sequence on any rank of its coherence group; the inverse of `sequence_of`."""
    return sequence // RANKS * GROUP + sequence % RANKS % GROUP


@triton.jit
def after_earlier_kernels(PDL: tl.constexpr):
    """Wait until earlier kernels have ended and their stores are visible.

    PDL, programmatic dependent launch (SM90 and later): a kernel is set up while the one before it still
    runs, and waits here instead of being launched late. From here on its own successor may be set up. Before
    this call a kernel may read only weights, tables, and stores of kernels before the latest one, which has
    waited for them.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pointer_at(address, kind: tl.constexpr):
    """Cast an address, a multiple of 16 bytes, to a pointer with this alignment.

    Triton forgets the alignment of the address, and would load one element at a time.
    """
    return tl.multiple_of(address.to(kind), 16)


@triton.jit
def signal(flag_addresses, number, RANKS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Raise this rank's flag on every rank, after the rows of this rank's earlier kernels.

    flag_addresses [RANKS] int64: this rank's flag in each rank's memory. One program of the kernel after the
    writers calls this: the end of the writers has completed their stores. A fence in every writing program
    would cost more.
    """
    rank = tl.arange(0, BLOCK_G)
    exists = rank < RANKS
    flags = tl.load(flag_addresses + rank, mask=exists, other=0).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(flags, number + rank * 0, mask=exists, sem="release", scope="sys")


@triton.jit
def wait_for_all(flags, number, failed, most_polls, RANKS: tl.constexpr):
    """Return once all flags are at least `number`, or after `most_polls` polls with failed[0] = number.

    A poll takes about a microsecond; the limit keeps this rank from spinning if another one dies. After a
    failure no kernel waits any more: the host finds the number in `failed` and ends the job.
    """
    polls = tl.where(tl.load(failed, volatile=True) == 0, most_polls, 0)
    for rank in tl.static_range(RANKS):
        seen = tl.load(flags + rank, volatile=True)
        spins = polls * 0
        while (seen < number) & (spins < polls):
            seen = tl.load(flags + rank, volatile=True)
            spins += 1
        if seen < number:
            tl.atomic_max(failed, number)
        tl.atomic_add(flags + rank, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def number_of(step, layer, layers):
    """Number of this layer's exchange, from step [1] int64 and the layer; never 0."""
    return (tl.load(step) * layers + layer + 1).to(tl.int32)


@triton.jit
def moments(x, mask, D: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """Mean and inverse deviation of a row for LayerNorm, or with RMS for RMSNorm, whose mean is 0.

    x [BLOCK] float32: 0 outside the mask.
    """
    mean = tl.full([], 0.0, tl.float32) if RMS else tl.sum(x, 0) / D
    centred = tl.where(mask, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)


@triton.jit
def scaled(x, mean, scale, w, b, RMS: tl.constexpr):
    """Apply a norm from its moments, in float32, with weight w and bias b; RMSNorm has no bias."""
    weighted = (x - mean) * scale * w.to(tl.float32)
    return weighted if RMS else weighted + b.to(tl.float32)


@triton.jit
def normalise(x, mask, w, b, D: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """Norm of one row, float32 [BLOCK]; x is 0 outside the mask."""
    mean, scale = moments(x, mask, D, EPS, RMS)
    return scaled(x, mean, scale, w, b, RMS)


def is_sm90(device: torch.device) -> bool:
    """True for a GPU of compute capability 9.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def programmatic_launch(device: torch.device) -> dict[str, Any]:
    """Launch keywords of every kernel: programmatic dependent launch on SM90 and later."""
    return {"PDL": True, "launch_pdl": True} if is_sm90(device) else {"PDL": False}
