"""Which tokens a rank runs, whose context it keeps, and what it shares: the strategies of a job.

A single process and `replicated` run every token on every rank (`AllTokens`); `dispatch-combine`, `coherent`
and `node-coherent` are one strategy, `OwnedTokens`, with coherence groups of 1, all, or a node's ranks.
"""

from bisect import bisect_left
from typing import Protocol

from torch import Tensor

from exflow.comm.collectives import Exchange
from exflow.errors import InputError
from exflow.job.cluster import coherence_group
from exflow.model.decoder import AttentionContext, MoELayout, Rows
from exflow.model.single_process import AllExpertsHere
from exflow.placement.plan.strategy import AUTO, Strategy
from exflow.placement.plan.topology import Topology
from exflow.runtime.expert_parallel import ExpertParallel, PlanTables, Replicated
from exflow.runtime.hierarchical import HierarchicalParallel
from exflow.runtime.kv_cache import DecodeAttention, KVCache, KVSharing, PrefillAttention


class RankStrategy(Protocol):
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

    def finish_sharing(self) -> None:
        """Wait for what other ranks gave, if a step that is not run by `step` is to see it."""

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

    def finish_sharing(self) -> None:
        """Nothing was given."""

    def idle(self, rows: Rows) -> bool:
        return len(rows.sequence_T) == 0


class OwnedTokens:
    """Each token is run by its owner. A sequence's home is its id modulo the ranks; prompts run at home.

    New keys and values of a layer are needed by the group a whole step later. Those of the first half of the
    layers are shared while the second half runs, the others while the next step's first half does.
    """

    def __init__(
        self,
        exchange: Exchange,
        tables: PlanTables,
        group_size: int,
        moe_layer_ids: tuple[int, ...],
        layers: int,
        experts: type[ExpertParallel] = ExpertParallel,
    ) -> None:
        self.exchange = exchange
        self.rank, self.num_ranks = exchange.cluster.rank, exchange.cluster.num_ranks
        self.group_size = group_size
        self.prefill_experts = experts(exchange, tables, 1)
        self.decode_experts = experts(exchange, tables, group_size)
        self.group = coherence_group(exchange.cluster, group_size) if group_size > 1 else None
        self.early: KVSharing | None = None
        self.late: KVSharing | None = None
        # how many dispatches a step has made before each hidden layer's attention
        self.dispatches_before = [bisect_left(moe_layer_ids, layer) for layer in range(layers)]
        # where the second half begins: after a dispatch, since before it nobody knows which sequences ended;
        # at 0 it is all of them
        halves = (layer for layer in range(layers // 2, layers) if self.dispatches_before[layer])
        self.middle = next(halves, 0)

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
        for experts in (self.prefill_experts, self.decode_experts):
            experts.begin_request()
        self.prefill_experts.begin(tokens_at)
        self.decode_experts.begin([len(each) for each in lengths_at])
        if self.group is not None:
            self.early, self.late = (KVSharing(cache, self.exchange, self.group) for _ in range(2))
        attention = PrefillAttention(cache, lengths_at[self.rank], self.early, self._in_group(tokens_at))
        return attention, self.prefill_experts

    def step(self, cache: KVCache, length: int) -> tuple[DecodeAttention, MoELayout]:
        self.decode_experts.begin(
            self.decode_experts.owned
        )  # sequences that ended since make it an upper bound
        if self.early is None or self.late is None:
            return DecodeAttention(cache, length), self.decode_experts
        early, late = self.early, self.late

        def before(attention: DecodeAttention, layer: int) -> None:  # held by it, so it holds none
            if layer == 0:
                early.finish()
            if layer == self.middle:
                late.finish()
                if layer:
                    early.start(attention.new_kv, self._new_kv_counts(range(layer)))

        return DecodeAttention(cache, length, before), self.decode_experts

    def share(self, attention: DecodeAttention) -> None:
        if self.late is not None:
            second_half = range(self.middle, len(self.dispatches_before))
            self.late.start(attention.new_kv[self.middle :], self._new_kv_counts(second_half))

    def finish_sharing(self) -> None:
        for sharing in (self.early, self.late):
            if sharing is not None:
                sharing.finish()

    def idle(self, rows: Rows) -> bool:
        return sum(self.decode_experts.owned) == 0

    def _new_kv_counts(self, layers: range) -> list[int]:
        """New keys and values of these layers in this step, counted for each member of the group."""
        owned = [self.decode_experts.history[self.dispatches_before[layer]] for layer in layers]
        return self._in_group([sum(of_layer[rank] for of_layer in owned) for rank in range(self.num_ranks)])

    def _in_group(self, per_rank: list[int]) -> list[int]:
        first = self.rank - self.rank % self.group_size
        return per_rank[first : first + self.group_size]


def single_process() -> AllTokens:
    return AllTokens(AllExpertsHere(), exchange=None)


def strategy_named(name: str, num_nodes: int) -> Strategy | None:
    """Raises InputError for an unknown strategy, or one that makes no sense on this number of nodes."""
    if name not in (*Strategy, AUTO):
        raise InputError(f"strategy {name!r} is unknown; give {', '.join((*Strategy, AUTO))}")
    if name == AUTO:
        return None
    if name == Strategy.NODE_COHERENT and num_nodes == 1:
        raise InputError("strategy node-coherent: all ranks are on one node; give coherent instead")
    return Strategy(name)


def check_relays(topology: Topology, top_k: int, strategy: Strategy | None, device_type: str) -> None:
    """Raises InputError where the transport `relayed` is impossible, or saves no message.

    On GPUs it does more than save messages: captured steps have fewer chunks.
    """
    if topology.num_nodes == 1 or topology.gpus_per_node == 1:
        raise InputError(f"transport relayed: {topology} have no nodes of several ranks; give another")
    if strategy == Strategy.REPLICATED:
        raise InputError("transport relayed: strategy replicated has nothing to relay; give another of both")
    if top_k == 1 and device_type == "cpu":
        raise InputError("transport relayed: a token with one expert sends one message anyway; give eager")


def make_strategy(
    name: Strategy,
    exchange: Exchange,
    tables: PlanTables,
    moe_layer_ids: tuple[int, ...],
    layers: int,
    hierarchical: bool = False,
) -> RankStrategy:
    """The strategy called `name` for this rank of the job; every rank of it must call this."""
    cluster = exchange.cluster
    if name == Strategy.REPLICATED:
        return AllTokens(Replicated(exchange, tables), exchange)
    experts = HierarchicalParallel if hierarchical else ExpertParallel
    return OwnedTokens(
        exchange,
        tables,
        name.group_size(cluster.num_ranks, cluster.ranks_per_node),
        moe_layer_ids,
        layers,
        experts,
    )
