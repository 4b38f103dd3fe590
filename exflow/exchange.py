"""The collectives of a decode step behind one face, over gloo and NCCL alike, each of them counted.

Transport 0 of the design: equal splits of a capacity that every rank knows beforehand, so no counts are
exchanged first. A row is a run of bytes; a chunk from one rank to another is a header of int32 (the number of
rows, then the sender's note) followed by `capacity` rows, of which the first so many are filled.

Shapes: N rows to send, M rows received, B bytes a row, G ranks.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from exflow.distributed import Cluster, CoherenceGroup

Purpose = Literal["dispatch", "return"]

# torch 2.13 renamed it, and warns at every call of the older name
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass
class Counters:
    """What one rank sent in one phase; `total` over ranks gives the job's figures.

    Messages and K/V copies are rows that left for another rank of the same node (intra) or of another one
    (inter), as placement.traffic predicts them. hidden_bytes and kv_bytes are their size; wire_bytes is what
    the collectives carried off the rank, padding and headers included.
    """

    all_to_alls: int = 0
    gathers: int = 0
    all_reduces: int = 0
    dispatch_intra: int = 0
    dispatch_inter: int = 0
    return_intra: int = 0
    return_inter: int = 0
    kv_intra: int = 0
    kv_inter: int = 0
    hidden_bytes: int = 0
    kv_bytes: int = 0
    wire_bytes: int = 0

    @property
    def messages(self) -> int:
        return self.dispatch_intra + self.dispatch_inter + self.return_intra + self.return_inter


def total(counters: list[Counters]) -> Counters:
    """The job's figures: messages and bytes summed over ranks, collectives as each took part in them."""
    collectives = ("all_to_alls", "gathers", "all_reduces")
    summed = {name: sum(getattr(each, name) for each in counters) for name in vars(counters[0])}
    return Counters(**(summed | {name: getattr(counters[0], name) for name in collectives}))


@dataclass(frozen=True)
class Received:
    """Rows [M, B] uint8 from other ranks, ordered by sender, and every rank's note [G, notes] int64."""

    rows_MB: Tensor
    notes: Tensor


@dataclass
class PendingGather:
    """A gather under way; `wait` returns the rows of all members, this rank's own included, [M, B] uint8."""

    work: dist.Work
    chunks: Tensor
    row_bytes: int

    def wait(self) -> Tensor:
        self.work.wait()  # on GPUs the stream waits, not the host
        return _filled_rows(self.chunks, 1, self.row_bytes)


@dataclass
class Exchange:
    """Collectives among the ranks of `cluster`. `counters` is replaced by the engine at each phase."""

    cluster: Cluster
    counters: Counters = field(default_factory=Counters)

    def all_to_all(
        self,
        rows_NB: Tensor,
        dest_N: Tensor,
        note: Tensor,
        capacity: int,
        purpose: Purpose,
        hidden_bytes: int,
    ) -> Received:
        """Send each row to its rank (never this one); hear every other rank's rows and note.

        capacity: an upper bound, equal on all ranks, of the rows any rank sends to any other.
        hidden_bytes: the part of a row that is hidden state, for the count.
        """
        ranks = self.cluster.num_ranks
        header = torch.cat([torch.bincount(dest_N, minlength=ranks)[:, None], note.expand(ranks, -1)], dim=1)
        send = _chunks(rows_NB, dest_N, header, capacity)
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send)
        self._count(dest_N, purpose, hidden_bytes, (ranks - 1) * send[0].numel())
        return Received(
            _filled_rows(received, header.shape[1], rows_NB.shape[1]),
            _headers(received, header.shape[1])[:, 1:].long(),
        )

    def _count(self, dest_N: Tensor, purpose: Purpose, hidden_bytes: int, wire_bytes: int) -> None:
        intra = int((dest_N // self.cluster.ranks_per_node == self.cluster.node).sum())
        inter = len(dest_N) - intra
        if purpose == "dispatch":
            self.counters.dispatch_intra += intra
            self.counters.dispatch_inter += inter
        else:
            self.counters.return_intra += intra
            self.counters.return_inter += inter
        self.counters.all_to_alls += 1
        self.counters.hidden_bytes += len(dest_N) * hidden_bytes
        self.counters.wire_bytes += wire_bytes

    def start_gather(
        self, rows_NB: Tensor, capacity: int, group: CoherenceGroup, kv_bytes: int
    ) -> PendingGather:
        """Begin to give all members of `group` each other's rows; at most `capacity` a member.

        kv_bytes: the part of a row that is keys and values, for the count.
        """
        to_first_N = torch.zeros(len(rows_NB), dtype=torch.int64, device=rows_NB.device)
        header = torch.full((1, 1), len(rows_NB), device=rows_NB.device)
        chunk = _chunks(rows_NB, to_first_N, header, capacity)
        chunks = chunk.new_empty(group.size, chunk.shape[1])
        work = _all_gather(chunks, chunk, group=group.processes, async_op=True)
        others_in_node = sum(self.cluster.node_of(rank) == self.cluster.node for rank in group.ranks) - 1
        self.counters.gathers += 1
        self.counters.kv_intra += len(rows_NB) * others_in_node
        self.counters.kv_inter += len(rows_NB) * (group.size - 1 - others_in_node)
        self.counters.kv_bytes += len(rows_NB) * (group.size - 1) * kv_bytes
        self.counters.wire_bytes += (group.size - 1) * chunk.numel()
        return PendingGather(work, chunks, rows_NB.shape[1])

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        dist.all_reduce(values)
        ranks = self.cluster.num_ranks
        self.counters.all_reduces += 1
        self.counters.wire_bytes += 2 * values.nbytes * (ranks - 1) // ranks  # ring: reduce-scatter, gather
        return values


def pack(*columns: Tensor) -> Tensor:
    """Lay columns [N, any] of any dtype side by side as bytes [N, B]."""
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)


def unpack(rows_NB: Tensor, *like: tuple[torch.dtype, int]) -> list[Tensor]:
    """The inverse of `pack`: for each (dtype, width) the column [N, width]."""
    columns, start = [], 0
    for dtype, width in like:
        size = dtype.itemsize * width
        columns.append(_copied(rows_NB[:, start : start + size]).view(dtype))
        start += size
    return columns


def _chunks(rows_NB: Tensor, dest_N: Tensor, header: Tensor, capacity: int) -> Tensor:
    """One chunk for each line of `header` [G, fields], as bytes [G, header + capacity * B]."""
    row_bytes, head_bytes = rows_NB.shape[1], 4 * header.shape[1]
    chunks = rows_NB.new_zeros(len(header), head_bytes + capacity * row_bytes)
    chunks[:, :head_bytes] = header.to(torch.int32).view(torch.uint8)
    order = torch.argsort(dest_N, stable=True)
    counts = torch.bincount(dest_N, minlength=len(header))
    place_N = torch.arange(len(dest_N), device=dest_N.device) - (counts.cumsum(0) - counts)[dest_N[order]]
    body = chunks[:, head_bytes:].view(len(header), capacity, row_bytes)
    body[dest_N[order], place_N] = rows_NB[order]
    return chunks


def _headers(chunks: Tensor, fields: int) -> Tensor:
    return _copied(chunks[:, : 4 * fields]).view(torch.int32)


def _copied(part: Tensor) -> Tensor:
    """A dense copy; `contiguous` leaves a single row where it lies, perhaps unaligned for a wider type."""
    return part.clone(memory_format=torch.contiguous_format)


def _filled_rows(chunks: Tensor, fields: int, row_bytes: int) -> Tensor:
    """The rows that are filled, chunk after chunk, [M, B]."""
    capacity = (chunks.shape[1] - 4 * fields) // row_bytes
    body = chunks[:, 4 * fields :].view(len(chunks), capacity, row_bytes)
    filled = torch.arange(capacity, device=chunks.device) < _headers(chunks, fields)[:, :1]
    return body[filled]
