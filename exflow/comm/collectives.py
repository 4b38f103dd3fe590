"""The collectives of prompts and eager decode steps, over gloo or NCCL, with counters of traffic.

No counts are exchanged first. In a combine and in a gather both ends of a pair know the number of rows, and
exactly these rows are sent. In a dispatch, a chunk has the capacity that both ends predict (capacity.py); a
pair with more rows sends the overflow point to point. A row is a run of bytes. A dispatch's chunk is a header
of int32 (the number of rows, then the sender's note), the rows, and zeros up to the capacity.

Shapes: N rows to send, M rows received, B bytes a row, G ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from exflow.comm.capacity import Capacity
from exflow.comm.pairwise import Chunks, PairwiseExchange
from exflow.job.cluster import Cluster, CoherenceGroup, annotate_errors

Purpose = Literal["dispatch", "return"]


@dataclass
class Counters:
    """Messages, bytes and collectives of one rank in one phase; `total` over ranks gives the job's figures.

    Messages and K/V copies are rows sent to another rank of the same node (intra) or of another node (inter),
    as placement.traffic predicts them. hidden_bytes and kv_bytes are their size. wire_bytes counts all bytes
    that collectives carried off the rank, with padding and headers. `late` counts overflows: chunks with more
    rows than their capacity.
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
    late: int = 0

    @property
    def messages(self) -> int:
        return self.dispatch_intra + self.dispatch_inter + self.return_intra + self.return_inter


def total(counters: list[Counters]) -> Counters:
    """The job's figures: messages and bytes summed over ranks; collectives count once, as all take part."""
    collectives = ("all_to_alls", "gathers", "all_reduces")
    summed = {name: sum(getattr(each, name) for each in counters) for name in vars(counters[0])}
    return Counters(**(summed | {name: getattr(counters[0], name) for name in collectives}))


@dataclass(frozen=True)
class Dispatched:
    """The result of a dispatch: rows [M, B] uint8 of other ranks, ordered by sender, and every rank's note.

    sent, came: number of rows sent to each rank, and received from each.
    """

    rows_MB: Tensor
    notes: list[list[int]]
    sent: list[int]
    came: list[int]


@dataclass
class PendingGather:
    """A gather under way; `wait` returns the rows of all other members, [M, B] uint8, ordered by member."""

    finish: Callable[[], object]
    rows_MB: Tensor

    @annotate_errors("a gather of keys and values")
    def wait(self) -> Tensor:
        self.finish()
        return self.rows_MB


@dataclass
class Exchange:
    """Collectives among the ranks of `cluster`. `counters` is replaced by the engine at each phase.

    group: the group whose members are the ranks of `cluster`, in order; None means the whole job.
    pairwise: runs the all-to-alls of the whole job where the backend's all-to-all is slow.
    """

    cluster: Cluster
    counters: Counters = field(default_factory=Counters)
    group: CoherenceGroup | None = None
    pairwise: PairwiseExchange | None = None

    @annotate_errors("a dispatch")
    def dispatch(
        self, rows_NB: Tensor, dest_N: Tensor, note: list[int], capacity: Capacity, hidden_bytes: int
    ) -> Dispatched:
        """Send each row to its rank (never this one); receive every other rank's rows and note.

        capacity: the capacity from one rank to another must be equal on both.
        hidden_bytes: bytes of a row that are hidden state, for the counters.
        """
        rank, row_bytes = self.cluster.rank, rows_NB.shape[1]
        rows_to = _by_rank(rows_NB, dest_N, self.cluster.num_ranks)
        sent = [len(rows) for rows in rows_to]
        header_GH = _as_headers([[count, *note] for count in sent], rows_NB.device)
        pieces = [_pieces(*each) for each in zip(header_GH, rows_to, capacity.to, strict=True)]
        sizes_to, sizes_from = (
            [0 if other == rank else len(header_GH[0]) + rows * row_bytes for other, rows in enumerate(each)]
            for each in (capacity.to, capacity.come)
        )
        flat = [piece for to, chunk in enumerate(pieces) if to != rank for piece in chunk]
        chunks = list(self._swap(_joined(flat, rows_NB), sizes_to, sizes_from).split(sizes_from))
        chunks[rank] = header_GH[rank]
        came, notes = _read_headers(chunks, 1 + len(note))
        bodies = [chunk[len(header_GH[0]) :].view(-1, row_bytes) for chunk in chunks]
        late = self._swap_late(rows_to, capacity, came)
        rows_of = [
            torch.cat([body[:count], rest]) for body, count, rest in zip(bodies, came, late, strict=True)
        ]
        self._count(sent, "dispatch", hidden_bytes)
        return Dispatched(torch.cat(rows_of), notes, sent, came)

    @annotate_errors("a combine")
    def combine(self, rows_NB: Tensor, dest_N: Tensor, come: list[int], hidden_bytes: int) -> Tensor:
        """Send each row to its rank (never this one); return the rows of others [M, B], ordered by sender.

        come: number of rows that each rank sends to this one; the caller must know it.
        hidden_bytes: bytes of a row that are hidden state, for the counters.
        """
        row_bytes = rows_NB.shape[1]
        rows_to = _by_rank(rows_NB, dest_N, self.cluster.num_ranks)
        sent = [len(rows) for rows in rows_to]
        sizes_to, sizes_from = ([rows * row_bytes for rows in counts] for counts in (sent, come))
        arrived = self._swap(torch.cat(rows_to).flatten(), sizes_to, sizes_from)
        self._count(sent, "return", hidden_bytes)
        return arrived.view(-1, row_bytes)

    def _swap(self, chunks: Tensor, sizes_to: list[int], sizes_from: list[int]) -> Tensor:
        """One all-to-all of concatenated chunks. sizes_to, sizes_from: bytes to each rank, and from each."""
        arrived = chunks.new_empty(sum(sizes_from))
        if self.pairwise is None:
            options: dict[str, Any] = {} if self.group is None else {"group": self.group.processes}
            dist.all_to_all_single(arrived, chunks, sizes_from, sizes_to, **options)
        else:
            self.pairwise.swap(Chunks(list(chunks.split(sizes_to)), list(arrived.split(sizes_from))))
        self.counters.all_to_alls += 1
        self.counters.wire_bytes += len(chunks)
        return arrived

    def _swap_late(self, rows_to: list[Tensor], capacity: Capacity, came: list[int]) -> list[Tensor]:
        """Exchange the rows beyond the chunks' capacity; returns the rows from each rank."""
        late_to = [rows[most:] for rows, most in zip(rows_to, capacity.to, strict=True)]
        late_from = [
            rows_to[0].new_empty(max(0, count - most), rows_to[0].shape[1])
            for count, most in zip(came, capacity.come, strict=True)
        ]
        operations = [
            self._point_to_point(send_or_receive, rows, other)
            for send_or_receive, late in ((dist.isend, late_to), (dist.irecv, late_from))
            for other, rows in enumerate(late)
            if len(rows)
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        self.counters.late += sum(len(rows) > 0 for rows in late_to)
        self.counters.wire_bytes += sum(rows.nbytes for rows in late_to)
        return late_from

    def _point_to_point(self, send_or_receive: Callable[..., Any], rows: Tensor, other: int) -> dist.P2POp:
        if self.group is None:
            return dist.P2POp(send_or_receive, rows, other)
        return dist.P2POp(send_or_receive, rows, self.group.ranks[other], self.group.processes)

    def _count(self, sent: list[int], purpose: Purpose, hidden_bytes: int) -> None:
        first = self.cluster.node * self.cluster.ranks_per_node
        intra = sum(sent[first : first + self.cluster.ranks_per_node])
        inter = sum(sent) - intra
        if purpose == "dispatch":
            self.counters.dispatch_intra += intra
            self.counters.dispatch_inter += inter
        else:
            self.counters.return_intra += intra
            self.counters.return_inter += inter
        self.counters.hidden_bytes += sum(sent) * hidden_bytes

    def start_gather(
        self, rows_NB: Tensor, counts: list[int], group: CoherenceGroup, kv_bytes: int
    ) -> PendingGather:
        """Start an all-gather of rows in `group`, where member i has counts[i] rows.

        kv_bytes: bytes of a row that are keys and values, for the counters.
        """
        me, row_bytes = group.ranks.index(self.cluster.rank), rows_NB.shape[1]
        assert len(rows_NB) == counts[me]
        sizes_from = [0 if member == me else rows * row_bytes for member, rows in enumerate(counts)]
        arrived = rows_NB.new_empty(sum(sizes_from))
        finish = self._share(rows_NB.flatten(), arrived, sizes_from, group)
        others_in_node = sum(self.cluster.node_of(rank) == self.cluster.node for rank in group.ranks) - 1
        self.counters.gathers += 1
        self.counters.kv_intra += len(rows_NB) * others_in_node
        self.counters.kv_inter += len(rows_NB) * (group.size - 1 - others_in_node)
        self.counters.kv_bytes += len(rows_NB) * (group.size - 1) * kv_bytes
        self.counters.wire_bytes += rows_NB.nbytes * (group.size - 1)
        return PendingGather(finish, arrived.view(-1, row_bytes))

    def _share(
        self, mine: Tensor, arrived: Tensor, sizes_from: list[int], group: CoherenceGroup
    ) -> Callable[[], object]:
        """Start to send `mine` to all other members, and to receive their rows into `arrived`.

        Returns a function that waits for the end: on GPUs the stream waits, not the host.
        """
        if self.pairwise is None:
            me = group.ranks.index(self.cluster.rank)
            # gloo's all-gather needs equal parts
            sizes_to = [0 if member == me else len(mine) for member in range(group.size)]
            copies = mine.repeat(group.size - 1)
            work: dist.Work = dist.all_to_all_single(
                arrived, copies, sizes_from, sizes_to, group=group.processes, async_op=True
            )
            return work.wait
        to, come = ([mine[:0]] * self.cluster.num_ranks for _ in range(2))
        for rank, part in zip(group.ranks, arrived.split(sizes_from), strict=True):
            if rank != self.cluster.rank:
                to[rank], come[rank] = mine, part
        self.pairwise.defer(Chunks(to, come))
        return self.pairwise.finish

    @annotate_errors("an all-reduce")
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
        # `contiguous` would leave a single row where it lies, perhaps unaligned for a wider type
        column = rows_NB[:, start : start + size].clone(memory_format=torch.contiguous_format)
        columns.append(column.view(dtype))
        start += size
    return columns


def _by_rank(rows_NB: Tensor, dest_N: Tensor, ranks: int) -> list[Tensor]:
    """The rows for each rank, in the order given."""
    counts = torch.bincount(dest_N, minlength=ranks).tolist()
    return list(rows_NB[torch.argsort(dest_N, stable=True)].split(counts))


def _as_headers(values: list[list[int]], device: torch.device) -> Tensor:
    """Convert lines of int32 to bytes [lines, 4 * numbers] uint8."""
    return torch.tensor(values, dtype=torch.int32).view(torch.uint8).to(device)


def _read_headers(chunks: list[Tensor], fields: int) -> tuple[list[int], list[list[int]]]:
    """The number of rows that each sender announces, and its note."""
    headers: list[list[int]] = (
        torch.stack([chunk[: 4 * fields] for chunk in chunks]).view(torch.int32).tolist()
    )
    return [header[0] for header in headers], [header[1:] for header in headers]


def _pieces(header_H: Tensor, rows_NB: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of a chunk: header, rows, and zeros up to its capacity."""
    spare = max(0, capacity - len(rows_NB)) * rows_NB.shape[1]
    return header_H, rows_NB[:capacity].flatten(), rows_NB.new_zeros(spare)


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like.new_empty(0), *pieces])
