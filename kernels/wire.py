"""What the kernels of a decode step share: which sequence a row is, and how ranks tell each other they are
done.

A rank may own the sequences of its coherence group: row i of its hidden states is sequence `sequence_of(i)`
of the batch. Ranks write into each other's memory and then raise a flag: one int32 for each sender, which
holds the number of the sender's latest exchange. Numbers only grow, so nothing is ever cleared.
"""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def sequence_of(row, RANK: tl.constexpr, RANKS: tl.constexpr, GROUP: tl.constexpr):
    """The sequence of the batch that a row stands for; sequence b has its home on rank b % RANKS."""
    return row // GROUP * RANKS + RANK // GROUP * GROUP + row % GROUP


@triton.jit
def row_of(sequence, RANKS: tl.constexpr, GROUP: tl.constexpr):
    """The inverse, on any rank of the sequence's coherence group."""
    return sequence // RANKS * GROUP + sequence % RANKS % GROUP


@triton.jit
def after_earlier_kernels(PDL: tl.constexpr):
    """Wait until earlier kernels are done and what they wrote is seen.

    PDL, programmatic dependent launch (SM90 and later): a kernel is set up while the one before it still
    runs, and waits here instead of being launched late. Its own successor may be set up from here on. What a
    kernel reads before it calls this must be there already: weights and tables, and what any kernel but the
    latest wrote, since that one has waited for the others.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pointer_at(address, kind: tl.constexpr):
    """An address as a pointer. That it is a multiple of 16 bytes is forgotten unless said of the pointer
    itself, and loads then take one element at a time."""
    return tl.multiple_of(address.to(kind), 16)


@triton.jit
def signal(flag_addresses, number, RANKS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Raise this rank's flag on every rank: what earlier kernels of this rank wrote is there.

    flag_addresses [RANKS] int64: my flag in each rank's memory. Called by one program of the kernel that
    follows those that wrote, whose end has completed their stores; a fence in every program that writes would
    cost more.
    """
    rank = tl.arange(0, BLOCK_G)
    exists = rank < RANKS
    flags = tl.load(flag_addresses + rank, mask=exists, other=0).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(flags, number + rank * 0, mask=exists, sem="release", scope="sys")


@triton.jit
def wait_for_all(flags, number, failed, most_polls, RANKS: tl.constexpr):
    """Return when every rank has raised its flag to `number`, or with failed[0] = number after `most_polls`.

    A poll of a flag takes about a microsecond; a rank that died must not leave this one spinning.
    After a failure nothing waits any more: the host finds the number in `failed` and ends the job.
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
    """The number of this layer's exchange: of step [1] int64 and the layer, never 0."""
    return (tl.load(step) * layers + layer + 1).to(tl.int32)


@triton.jit
def moments(x, mask, D: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """Mean and inverse deviation of a row, as LayerNorm has them, or RMSNorm (RMS), which knows no mean; x
    [BLOCK] float32, zero where masked."""
    mean = tl.full([], 0.0, tl.float32) if RMS else tl.sum(x, 0) / D
    centred = tl.where(mask, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)


@triton.jit
def scaled(x, mean, scale, w, b, RMS: tl.constexpr):
    """The norm from its moments, in float32, with weight w and bias b, which RMSNorm has not."""
    weighted = (x - mean) * scale * w.to(tl.float32)
    return weighted if RMS else weighted + b.to(tl.float32)


@triton.jit
def normalise(x, mask, w, b, D: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """The norm of one row in float32 [BLOCK]; x is zero where masked."""
    mean, scale = moments(x, mask, D, EPS, RMS)
    return scaled(x, mean, scale, w, b, RMS)


def is_sm90(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 9.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def programmatic_launch(device: torch.device) -> dict[str, Any]:
    """The launch keywords of every kernel: whether a GPU sets it up while the one before it still runs."""
    return {"PDL": True, "launch_pdl": True} if is_sm90(device) else {"PDL": False}
