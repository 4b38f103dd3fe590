"""All-to-alls in rounds: ranks are threads of this process, joined by real gloo connections."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exflow.comm.pairwise import FEW_BYTES, Chunks, PairwiseExchange
from exflow.job.cluster import Cluster

CPU = torch.device("cpu")
RANKS = 4
OnRanks = Callable[[Callable[[PairwiseExchange], list[Tensor]]], list[list[Tensor]]]


@pytest.fixture(scope="module")
def on_ranks() -> Iterator[OnRanks]:
    """Do something on all ranks at once; what it returned, by rank."""
    store, patience = dist.HashStore(), timedelta(seconds=20)

    def join(rank: int) -> PairwiseExchange:
        up, down = (
            dist.ProcessGroupGloo(dist.PrefixStore(way, store), rank, RANKS, patience)
            for way in ("up", "down")
        )
        return PairwiseExchange(Cluster(rank, RANKS, 1, CPU), up, down)

    with ThreadPoolExecutor(RANKS) as pool:
        ranks = list(pool.map(join, range(RANKS)))
        yield lambda work: list(pool.map(work, ranks))


# bytes from each rank to each: nothing, few, and so many that rounds are waited for
SIZES = st.lists(
    st.lists(st.sampled_from([0, 1, 5, FEW_BYTES // 2, 2 * FEW_BYTES]), min_size=RANKS, max_size=RANKS),
    min_size=RANKS,
    max_size=RANKS,
)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.booleans())
def test_every_rank_hears_what_the_others_sent(
    on_ranks: OnRanks, sizes: list[list[int]], shared: list[list[int]], exchanged: bool
) -> None:
    """Test an exchange, a gather deferred beside it, and a gather waited for before it."""
    sent, behind = (
        [[torch.randint(256, (size,), dtype=torch.uint8) for size in row] for row in each]
        for each in (sizes, shared)
    )

    def swap(pairwise: PairwiseExchange) -> list[Tensor]:
        me = pairwise.cluster.rank
        arrived, gathered = (
            [torch.empty(row[me], dtype=torch.uint8) for row in each] for each in (sizes, shared)
        )
        pairwise.defer(Chunks(behind[me], gathered))
        if exchanged:
            pairwise.swap(Chunks(sent[me], arrived))
        pairwise.finish()
        assert not pairwise.deferred
        return arrived + gathered

    for me, arrived in enumerate(on_ranks(swap)):
        for other in set(range(RANKS)) - {me}:
            assert not exchanged or torch.equal(arrived[other], sent[other][me])
            assert torch.equal(arrived[RANKS + other], behind[other][me])


@pytest.mark.parametrize(("ranks", "per_node", "device"), [(4, 4, "cpu"), (1, 1, "cpu"), (4, 2, "cuda")])
def test_ranks_of_one_host_and_of_nccl_have_none(ranks: int, per_node: int, device: str) -> None:
    assert PairwiseExchange.between(Cluster(0, ranks, per_node, torch.device(device))) is None
