"""The wire format and the counters, without processes: ranks are threads, and swap their buffers by hand."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Queue
from threading import Barrier, local
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exflow.comm.capacity import Capacity, CapacityEstimator
from exflow.comm.collectives import Counters, Dispatched, Exchange, pack, total, unpack
from exflow.job.cluster import Cluster, CoherenceGroup

CPU = torch.device("cpu")
PATIENCE_S = 10  # what waits longer would wait for ever
HIDDEN_BYTES = 3
Result = TypeVar("Result")


@dataclass(frozen=True)
class Operation:
    """Stand-in for torch's P2POp."""

    kind: Any
    rows: Tensor
    other: int


class Wire:
    """Stand-in for torch's collectives; both ends of a pair must expect the same number of bytes."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.here, self.barrier = range(ranks), local(), Barrier(ranks)
        self.boxes: list[Any] = [None] * ranks
        self.queues = {(one, other): Queue[Tensor]() for one in self.ranks for other in self.ranks}
        self.carried = [0] * ranks  # bytes that left each rank
        self.late = [0] * ranks  # pairs that needed a second round, by sender

    def all_to_all_single(
        self, arrived: Tensor, sent: Tensor, sizes_from: list[int], sizes_to: list[int], **_: Any
    ) -> "Wire":
        me = self.here.rank
        assert sizes_to[me] == sizes_from[me] == 0
        self.boxes[me] = sent.split(sizes_to)
        self.barrier.wait(PATIENCE_S)
        chunks = [self.boxes[sender][me] for sender in self.ranks]
        assert [len(chunk) for chunk in chunks] == sizes_from
        arrived.copy_(torch.cat(chunks))
        self.carried[me] += len(sent)
        self.barrier.wait(PATIENCE_S)
        return self

    def batch_isend_irecv(self, operations: list[Operation]) -> list["Wire"]:
        me = self.here.rank
        for operation in operations:
            assert len(operation.rows)
            if operation.kind is dist.isend:
                self.queues[me, operation.other].put(operation.rows.clone())
                self.carried[me] += operation.rows.nbytes
                self.late[me] += 1
        for operation in operations:
            if operation.kind is dist.irecv:
                rows = self.queues[operation.other, me].get(timeout=PATIENCE_S)
                assert rows.shape == operation.rows.shape
                operation.rows.copy_(rows)
        return [self]

    def wait(self) -> None:
        """Do nothing: the handle of a collective that is already complete."""

    def run(
        self, per_node: int, of_rank: Callable[[Exchange], Result]
    ) -> tuple[list[Result], list[Counters]]:
        """Run `of_rank` on each rank; return its results and the counters."""
        exchanges = [Exchange(Cluster(rank, len(self.ranks), per_node, CPU)) for rank in self.ranks]

        def as_rank(exchange: Exchange) -> Result:
            self.here.rank = exchange.cluster.rank
            return of_rank(exchange)

        with self._in_place(), ThreadPoolExecutor(len(self.ranks)) as pool:
            results = list(pool.map(as_rank, exchanges))
        assert all(queue.empty() for queue in self.queues.values())
        return results, [exchange.counters for exchange in exchanges]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", self.all_to_all_single)
            patch.setattr(dist, "batch_isend_irecv", self.batch_isend_irecv)
            patch.setattr(dist, "P2POp", Operation)
            yield


@st.composite
def destinations(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Ranks per node, and for each rank of 1, 2 or 4 where its rows go: never to itself."""
    ranks = draw(st.sampled_from([1, 2, 4]))
    others = [[other for other in range(ranks) if other != rank] for rank in range(ranks)]
    rows = [draw(st.lists(st.sampled_from(each), max_size=9)) if each else [] for each in others]
    return draw(st.sampled_from([1, ranks])), rows


def random_rows(dest: list[list[int]], width: int) -> list[Tensor]:
    return [torch.randint(256, (len(each), width), dtype=torch.uint8) for each in dest]


def rows_for(rank: int, rows: list[Tensor], dest: list[list[int]]) -> Tensor:
    """Return the rows that a rank must receive, ordered by sender."""
    return torch.cat(
        [of[torch.tensor(to, dtype=torch.int64) == rank] for of, to in zip(rows, dest, strict=True)]
    )


def check_messages(counted: tuple[int, int], rank: int, dest: list[list[int]], per_node: int) -> None:
    near = sum(to // per_node == rank // per_node for to in dest[rank])
    assert counted == (near, len(dest[rank]) - near)


@given(destinations(), st.integers(1, 5), st.integers(0, 9))
def test_every_row_arrives_once_ordered_by_sender(
    routes: tuple[int, list[list[int]]], width: int, most: int
) -> None:
    """Whatever capacity there is: any, and another one for each pair."""
    per_node, dest = routes
    ranks, rows = len(dest), random_rows(dest, width)

    def capacity(sender: int, receiver: int) -> int:
        return 0 if sender == receiver else (most + sender + 2 * receiver) % 10

    def send(exchange: Exchange) -> Dispatched:
        rank = exchange.cluster.rank
        to = torch.tensor(dest[rank], dtype=torch.int64)
        capacities = Capacity(
            [capacity(rank, other) for other in range(ranks)],
            [capacity(other, rank) for other in range(ranks)],
        )
        return exchange.dispatch(rows[rank], to, [10 * rank, -rank], capacities, HIDDEN_BYTES)

    wire = Wire(ranks)
    received, counters = wire.run(per_node, send)
    for rank in range(ranks):
        assert torch.equal(received[rank].rows_MB, rows_for(rank, rows, dest))
        assert received[rank].notes == [[10 * sender, -sender] for sender in range(ranks)]
        assert received[rank].sent == [dest[rank].count(other) for other in range(ranks)]
        assert received[rank].came == [dest[sender].count(rank) for sender in range(ranks)]
        check_messages((counters[rank].dispatch_intra, counters[rank].dispatch_inter), rank, dest, per_node)
        assert counters[rank].hidden_bytes == HIDDEN_BYTES * len(dest[rank])
        chunks = [
            max(capacity(rank, other), dest[rank].count(other)) for other in range(ranks) if other != rank
        ]
        assert counters[rank].wire_bytes == wire.carried[rank] == sum(12 + rows * width for rows in chunks)
        late = [other for other in range(ranks) if dest[rank].count(other) > capacity(rank, other)]
        assert counters[rank].late == wire.late[rank] == len(late)


@settings(max_examples=50, deadline=None)
@given(destinations(), st.integers(1, 5))
def test_a_return_carries_its_rows_and_nothing_else(routes: tuple[int, list[list[int]]], width: int) -> None:
    per_node, dest = routes
    rows = random_rows(dest, width)

    def send(exchange: Exchange) -> Tensor:
        rank = exchange.cluster.rank
        come = [sender.count(rank) for sender in dest]
        to = torch.tensor(dest[rank], dtype=torch.int64)
        return exchange.combine(rows[rank], to, come, HIDDEN_BYTES)

    wire = Wire(len(dest))
    received, counters = wire.run(per_node, send)
    for rank in range(len(dest)):
        assert torch.equal(received[rank], rows_for(rank, rows, dest))
        check_messages((counters[rank].return_intra, counters[rank].return_inter), rank, dest, per_node)
        assert counters[rank].hidden_bytes == HIDDEN_BYTES * len(dest[rank])
        assert counters[rank].wire_bytes == wire.carried[rank] == len(dest[rank]) * width


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=4), st.integers(1, 5))
def test_a_gather_gives_each_the_rows_of_the_others(counts: list[int], width: int) -> None:
    """Two nodes, of which the second has one rank of the group; nothing is padded."""
    ranks = len(counts)
    rows = [torch.randint(256, (count, width), dtype=torch.uint8) for count in counts]

    def gather(exchange: Exchange) -> Tensor:
        everyone = CoherenceGroup(range(ranks), processes=None)  # type: ignore[arg-type]
        return exchange.start_gather(rows[exchange.cluster.rank], counts, everyone, kv_bytes=2).wait()

    wire = Wire(ranks)
    received, counters = wire.run(ranks - 1, gather)
    for rank in range(ranks):
        others = [rows[other] for other in range(ranks) if other != rank]
        assert torch.equal(received[rank], torch.cat(others))
        near = ranks - 2 if rank < ranks - 1 else 0
        assert counters[rank].kv_intra == near * counts[rank]
        assert counters[rank].kv_inter == (ranks - 1 - near) * counts[rank]
        assert counters[rank].kv_bytes == 2 * (ranks - 1) * counts[rank]
        assert counters[rank].wire_bytes == wire.carried[rank] == (ranks - 1) * counts[rank] * width


@st.composite
def rounds(draw: st.DrawFn) -> list[tuple[int, list[list[list[int]]]]]:
    """Dispatches: of which layer, and for each token of each of 3 ranks the other ranks that it visits.

    Mostly few tokens, now and then a burst of many that all go one way, or none at all.
    """
    others = [[1, 2], [0, 2], [0, 1]]

    def tokens(rank: int) -> list[list[int]]:
        visits = st.lists(st.sampled_from(others[rank]), max_size=2, unique=True)
        burst = st.builds(
            lambda count, other: [[other]] * count, st.integers(20, 40), st.sampled_from(others[rank])
        )
        drawn: list[list[int]] = draw(st.one_of(st.lists(visits, max_size=8), st.just([]), burst))
        return drawn

    return [
        (draw(st.integers(0, 2)), [tokens(rank) for rank in range(3)])
        for _ in range(draw(st.integers(1, 12)))
    ]


@settings(max_examples=40, deadline=None)
@given(rounds(), st.integers(0, 2))
def test_whatever_moves_the_two_ends_agree(
    steps: list[tuple[int, list[list[list[int]]]]], ended: int
) -> None:
    """Round after round with the capacity that each rank expects by itself; nobody hangs, nothing is lost."""
    dest = [[[to for visits in of_rank for to in visits] for of_rank in each] for _, each in steps]
    rows = [random_rows(each, 4) for each in dest]

    def send(exchange: Exchange) -> list[Tensor]:
        rank, received = exchange.cluster.rank, []
        expected = CapacityEstimator(rank, 3, round_bytes=64)
        for (layer, tokens), to, mine in zip(steps, dest, rows, strict=True):
            owned = [len(each) for each in tokens]
            at_most = [count + ended for count in owned]  # as where sequences have ended
            capacity = expected.capacity(layer, at_most, mine[rank].shape[1])
            arrived = exchange.dispatch(
                mine[rank], torch.tensor(to[rank], dtype=torch.int64), [], capacity, HIDDEN_BYTES
            )
            expected.observe(layer, owned, arrived.sent, arrived.came)
            received.append(arrived.rows_MB)
        return received

    received, _ = Wire(3).run(1, send)
    for rank in range(3):
        for number, arrived in enumerate(received[rank]):
            assert torch.equal(arrived, rows_for(rank, rows[number], dest[number]))


def test_two_ranks_by_eye() -> None:
    """Rank 0 sends the rows 7, 8 and 9 to rank 1, which sends nothing; its chunk has capacity for 2."""
    rows = [torch.tensor([[7], [8], [9]], dtype=torch.uint8), torch.empty(0, 1, dtype=torch.uint8)]
    capacities = [Capacity([0, 2], [0, 1]), Capacity([1, 0], [2, 0])]

    def send(exchange: Exchange) -> Dispatched:
        mine, capacity = rows[exchange.cluster.rank], capacities[exchange.cluster.rank]
        return exchange.dispatch(mine, torch.ones(len(mine), dtype=torch.int64), [5], capacity, 1)

    (at_0, at_1), counters = Wire(2).run(1, send)
    assert at_0.rows_MB.tolist() == []
    assert at_1.rows_MB.tolist() == [[7], [8], [9]]
    assert [each.dispatch_inter for each in counters] == [3, 0]
    assert [each.late for each in counters] == [1, 0]
    # a header of two numbers, and two rows and then one; a header, and capacity for a row
    assert [each.wire_bytes for each in counters] == [8 + 2 + 1, 8 + 1]


@given(st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 4))
def test_columns_come_out_of_a_row_as_they_went_in(rows: int, dtype: torch.dtype, width: int) -> None:
    hidden = torch.randn(rows, 8 * width).to(dtype)
    ids = torch.randint(-5, 1 << 30, (rows, width), dtype=torch.int32)
    keys = torch.randint(1 << 60, (rows, 1))
    packed = pack(hidden, keys, ids)
    assert packed.shape == (rows, hidden.itemsize * 8 * width + 8 + 4 * width)
    like = ((dtype, 8 * width), (torch.int64, 1), (torch.int32, width))
    for column, restored in zip((hidden, keys, ids), unpack(packed, *like), strict=True):
        assert torch.equal(column, restored)


def test_totals_add_messages_and_keep_collectives() -> None:
    """A collective is one for the job, however many ranks take part in it."""
    ranks = [Counters(all_to_alls=3, gathers=1, dispatch_intra=rank, kv_inter=2) for rank in range(4)]
    summed = total(ranks)
    assert (summed.all_to_alls, summed.gathers, summed.all_reduces) == (3, 1, 0)
    assert (summed.dispatch_intra, summed.kv_inter, summed.messages) == (6, 8, 6)
