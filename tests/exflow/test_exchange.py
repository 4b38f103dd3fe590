"""The wire format and the counters, without processes: the ranks' buffers are swapped by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exflow.distributed import Cluster
from exflow.exchange import Counters, Exchange, Received, pack, total, unpack

CPU = torch.device("cpu")


def swap(
    monkeypatch: pytest.MonkeyPatch, ranks: int, per_node: int, send: Callable[[Exchange], Received]
) -> tuple[list[Received], list[Counters]]:
    """What each rank receives, and counts, if all of them call `send` at once (here: twice, one by one)."""
    sent: list[Tensor] = []
    exchanges = [Exchange(Cluster(rank, ranks, per_node, CPU)) for rank in range(ranks)]
    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", lambda received, chunks: sent.append(chunks))
        for exchange in exchanges:
            send(exchange)
        received = []
        for rank, exchange in enumerate(exchanges):
            exchange.counters = Counters()
            arrived = torch.stack([chunks[rank] for chunks in sent])
            patch.setattr(dist, "all_to_all_single", lambda out, chunks, arrived=arrived: out.copy_(arrived))
            received.append(send(exchange))
    return received, [exchange.counters for exchange in exchanges]


@st.composite
def destinations(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Ranks per node, and for each rank of 1, 2 or 4 where its rows go: never to itself."""
    ranks = draw(st.sampled_from([1, 2, 4]))
    others = [[other for other in range(ranks) if other != rank] for rank in range(ranks)]
    rows = [draw(st.lists(st.sampled_from(each), max_size=9)) if each else [] for each in others]
    return draw(st.sampled_from([1, ranks])), rows


@given(destinations(), st.integers(1, 5), st.integers(0, 3))
def test_every_row_arrives_once_ordered_by_sender(
    routes: tuple[int, list[list[int]]], width: int, spare: int
) -> None:
    per_node, dest = routes
    ranks = len(dest)
    rows = [torch.randint(256, (len(each), width), dtype=torch.uint8) for each in dest]
    capacity = max(each.count(rank) for each in dest for rank in range(ranks)) + spare

    def send(exchange: Exchange) -> Received:
        rank = exchange.cluster.rank
        note = torch.tensor([10 * rank, -rank])
        to = torch.tensor(dest[rank], dtype=torch.int64)
        return exchange.all_to_all(rows[rank], to, note, capacity, "dispatch", hidden_bytes=3)

    with pytest.MonkeyPatch.context() as patch:
        received, counters = swap(patch, ranks, per_node, send)
    for rank in range(ranks):
        sent_here = [rows[sender][torch.tensor(dest[sender]) == rank] for sender in range(ranks)]
        assert torch.equal(received[rank].rows_MB, torch.cat(sent_here))
        assert received[rank].notes.tolist() == [[10 * sender, -sender] for sender in range(ranks)]
        near = sum(to // per_node == rank // per_node for to in dest[rank])
        assert (counters[rank].dispatch_intra, counters[rank].dispatch_inter) == (
            near,
            len(dest[rank]) - near,
        )
        assert counters[rank].hidden_bytes == 3 * len(dest[rank])
        assert counters[rank].wire_bytes == (ranks - 1) * (12 + capacity * width)


def test_two_ranks_by_eye(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 sends the rows 7 and 9 to rank 1, which sends nothing; a chunk has room for 3."""
    rows = [torch.tensor([[7], [9]], dtype=torch.uint8), torch.empty(0, 1, dtype=torch.uint8)]

    def send(exchange: Exchange) -> Received:
        mine = rows[exchange.cluster.rank]
        nothing = torch.empty(0, dtype=torch.int64)
        return exchange.all_to_all(mine, torch.ones(len(mine), dtype=torch.int64), nothing, 3, "return", 1)

    (at_0, at_1), counters = swap(monkeypatch, 2, 1, send)
    assert at_0.rows_MB.tolist() == []
    assert at_1.rows_MB.tolist() == [[7], [9]]
    assert [each.return_inter for each in counters] == [2, 0]
    assert [each.wire_bytes for each in counters] == [4 + 3, 4 + 3]  # the header, and three rows of a byte


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
