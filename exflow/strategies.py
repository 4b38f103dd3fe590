"""Which tokens a rank runs, whose context it keeps, and what it shares: the strategies of a job.

A single process and `replicated` run every token on every rank (`AllTokens`); `dispatch-combine`, `coherent`
and `node-coherent` are one strategy, `OwnedTokens`, with coherence groups of 1, all, or a node's ranks.
"""

from bisect import bisect_left
from typing import Literal, Protocol

from torch import Tensor

from exflow.decoder import AttentionContext, MoELayout, Rows
from exflow.distributed import coherence_group
from exflow.errors import InputError
from exflow.exchange import Exchange
from exflow.kv_cache import DecodeAttention, KVCache, KVSharing, PrefillAttention
from exflow.moe import AllExpertsHere, ExpertParallel, PlanTables, Replicated

Name = Literal["dispatch-combine", "coherent", "node-coherent", "replicated"]
NAMES: tuple[Name, ...] = ("dispatch-combine", "coherent", "node-coherent", "replicated")


class Strategy(Protocol):
    """One request's life: `prefill` once, then for every decode step `step` and `share`."""

    @property
    def exchange(self) -> Exchange | None:
        """The job's collectives; None in a single process."""

    def admits(self, sequence_N: Tensor) -> Tensor:
        """Which of the sequences start on this rank [N] bool."""

    def holds(self, sequence_N: Tensor) -> Tensor:
        """Of which sequences this rank keeps the context [N] bool."""

    def prefill(
        self, cache: KVCache, sequence_N: Tensor, lengths: list[int]
    ) -> tuple[AttentionContext, MoELayout]:
        """The collaborators of the prompts' forward pass; `lengths` of all prompts, admitted here or not."""

    def step(self, cache: KVCache, length: int) -> tuple[DecodeAttention, MoELayout]:
        """The collaborators of a decode step that looks at `length` positions."""

    def share(self, attention: DecodeAttention) -> None:
        """After a step: begin to give other ranks the context they must hold."""

    def idle(self, rows: Rows) -> bool:
        """After a pass: whether no rank had a token in it. All ranks answer alike."""


class AllTokens:
    """Every rank runs every token: a single process, or `replicated` with a layout that sums over ranks."""

    def __init__(self, layout: MoELayout, exchange: Exchange | None) -> None:
        self.layout = layout
        self.exchange = exchange

    def admits(self, sequence_N: Tensor) -> Tensor:
        return sequence_N >= 0

    def holds(self, sequence_N: Tensor) -> Tensor:
        return sequence_N >= 0

    def prefill(
        self, cache: KVCache, sequence_N: Tensor, lengths: list[int]
    ) -> tuple[AttentionContext, MoELayout]:
        return PrefillAttention(cache, lengths), self.layout

    def step(self, cache: KVCache, length: int) -> tuple[DecodeAttention, MoELayout]:
        return DecodeAttention(cache, length), self.layout

    def share(self, attention: DecodeAttention) -> None:
        """Every rank has computed all of it."""

    def idle(self, rows: Rows) -> bool:
        return len(rows.sequence_T) == 0


class OwnedTokens:
    """Each token is run by its owner. A sequence's home is its id modulo the ranks; prompts run at home."""

    def __init__(
        self,
        exchange: Exchange,
        tables: PlanTables,
        group_size: int,
        moe_layer_ids: tuple[int, ...],
        layers: int,
    ) -> None:
        self.exchange = exchange
        self.rank, self.num_ranks = exchange.cluster.rank, exchange.cluster.num_ranks
        self.group_size = group_size
        self.at_home = ExpertParallel(exchange, tables, group_size=1)
        self.in_group = ExpertParallel(exchange, tables, group_size)
        self.group = coherence_group(exchange.cluster, group_size) if group_size > 1 else None
        self.sharing: KVSharing | None = None
        # how many exchanges a step has made before each hidden layer's attention
        self.exchanges_before = [bisect_left(moe_layer_ids, layer) for layer in range(layers)]

    def admits(self, sequence_N: Tensor) -> Tensor:
        return sequence_N % self.num_ranks == self.rank

    def holds(self, sequence_N: Tensor) -> Tensor:
        return sequence_N % self.num_ranks // self.group_size == self.rank // self.group_size

    def prefill(
        self, cache: KVCache, sequence_N: Tensor, lengths: list[int]
    ) -> tuple[AttentionContext, MoELayout]:
        homes = (sequence_N % self.num_ranks).tolist()
        lengths_at = [
            [length for length, home in zip(lengths, homes, strict=True) if home == rank]
            for rank in range(self.num_ranks)
        ]
        tokens_at = [sum(each) for each in lengths_at]
        self.at_home.begin(tokens_at)
        self.in_group.begin([len(each) for each in lengths_at])
        if self.group is not None:
            self.sharing = KVSharing(cache, self.exchange, self.group)
        attention = PrefillAttention(
            cache, lengths_at[self.rank], self.sharing, self._largest_in_group(tokens_at)
        )
        return attention, self.at_home

    def step(self, cache: KVCache, length: int) -> tuple[DecodeAttention, MoELayout]:
        if self.sharing is not None:
            self.sharing.finish()
        self.in_group.begin(self.in_group.owned)  # sequences that ended since make it an upper bound
        return DecodeAttention(cache, length), self.in_group

    def share(self, attention: DecodeAttention) -> None:
        if self.sharing is None:
            return
        owned_in_layer = [self.in_group.history[count] for count in self.exchanges_before]
        born_at = [sum(owned[rank] for owned in owned_in_layer) for rank in range(self.num_ranks)]
        self.sharing.start(attention.born, self._largest_in_group(born_at))

    def idle(self, rows: Rows) -> bool:
        return sum(self.in_group.owned) == 0

    def _largest_in_group(self, per_rank: list[int]) -> int:
        first = self.rank - self.rank % self.group_size
        return max(per_rank[first : first + self.group_size])


def single_process() -> AllTokens:
    return AllTokens(AllExpertsHere(), exchange=None)


def strategy_named(name: str, num_nodes: int) -> Name:
    """Raises InputError for an unknown strategy, or one that makes no sense on so many nodes."""
    for known in NAMES:
        if known == name:
            if known == "node-coherent" and num_nodes == 1:
                raise InputError("--strategy node-coherent: all ranks are on one node; give coherent instead")
            return known
    raise InputError(f"--strategy {name}: no such strategy; give {', '.join(NAMES)}")


def make_strategy(
    name: Name, exchange: Exchange, tables: PlanTables, moe_layer_ids: tuple[int, ...], layers: int
) -> Strategy:
    """The strategy called `name` for this rank of the job; every rank of it must call this."""
    cluster = exchange.cluster
    if name == "replicated":
        return AllTokens(Replicated(exchange, tables), exchange)
    sizes = {"dispatch-combine": 1, "coherent": cluster.num_ranks, "node-coherent": cluster.ranks_per_node}
    return OwnedTokens(exchange, tables, sizes[name], moe_layer_ids, layers)
