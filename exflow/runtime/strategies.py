"""Strategies of a job: the tokens that a rank runs, and the contexts that it keeps and shares.

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
    """Strategy of one rank. A request calls `prefill` once, then `step` and `share` for every decode step."""

    @property
    def exchange(self) -> Exchange | None:
        """The job's collectives; None in a single process."""

    def admits(self, sequence_N: Tensor) -> Tensor:
        """Mask [N] bool: True for sequences whose prompts this rank runs."""

    def holds(self, sequence_N: Tensor) -> Tensor:
        """Mask [N] bool: True for sequences whose context this rank keeps."""

    def prefill(
        self, cache: KVCache, sequence_N: Tensor, lengths: list[int]
    ) -> tuple[AttentionContext, MoELayout]:
        """Attention context and MoE layout of the prompts' forward pass. lengths: tokens of all prompts."""

    def step(self, cache: KVCache, length: int) -> tuple[DecodeAttention, MoELayout]:
        """Attention context and MoE layout of a decode step that reads `length` positions."""

    def share(self, attention: DecodeAttention) -> None:
        """Start to share a step's new keys and values with the ranks that keep their context."""

    def finish_sharing(self) -> None:
        """Wait for shared keys and values; needed before a captured step, which does not call `step`."""

    def idle(self, rows: Rows) -> bool:
        """True if no rank had a token in the latest pass; equal on all ranks."""


class AllTokens:
    """Strategy in which every rank runs every token: a single process, or `replicated`."""

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
        """Do nothing: every rank computes all keys and values."""

    def finish_sharing(self) -> None:
        """Do nothing: no keys and values are shared."""

    def idle(self, rows: Rows) -> bool:
        return len(rows.sequence_T) == 0


class OwnedTokens:
    """Strategy in which a token's owner runs it. The home of a sequence is rank (id modulo ranks).

    Prompts run at home. The group needs new keys and values of a layer one step later. Keys and values of the
    first half of the layers are shared while the second half runs, the others during the next step's first
    half.
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
        # number of dispatches in a step before each hidden layer's attention
        self.dispatches_before = [bisect_left(moe_layer_ids, layer) for layer in range(layers)]
        # first layer of the second half; after a dispatch, which tells which sequences have ended. 0 means
        # that the second half is all layers
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
        # an upper bound: sequences may have ended since
        self.decode_experts.begin(self.decode_experts.owned)
        if self.early is None or self.late is None:
            return DecodeAttention(cache, length), self.decode_experts
        early, late = self.early, self.late

        # the attention is an argument: it holds this function, and a closure over it would be a cycle
        def before(attention: DecodeAttention, layer: int) -> None:
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
        """Number of new K/V rows of these layers in this step, for each member of the group."""
        owned = [self.decode_experts.history[self.dispatches_before[layer]] for layer in layers]
        return self._in_group([sum(of_layer[rank] for of_layer in owned) for rank in range(self.num_ranks)])

    def _in_group(self, per_rank: list[int]) -> list[int]:
        first = self.rank - self.rank % self.group_size
        return per_rank[first : first + self.group_size]


def single_process() -> AllTokens:
    return AllTokens(AllExpertsHere(), exchange=None)


def strategy_named(name: str, num_nodes: int) -> Strategy | None:
    """The strategy called `name`; None for `auto`. Raises InputError if it is unknown or needs more nodes."""
    if name not in (*Strategy, AUTO):
        raise InputError(f"strategy {name!r} is unknown; give {', '.join((*Strategy, AUTO))}")
    if name == AUTO:
        return None
    if name == Strategy.NODE_COHERENT and num_nodes == 1:
        raise InputError("strategy node-coherent: all ranks are on one node; give coherent instead")
    return Strategy(name)


def check_relays(topology: Topology, top_k: int, strategy: Strategy | None, device_type: str) -> None:
    """Raise InputError if the transport `relayed` is impossible or useless.

    For top-1 it saves no messages, but on GPUs captured steps have fewer chunks.
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
    """Build the strategy `name` for this rank of the job. Collective."""
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
