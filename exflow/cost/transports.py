"""Costs of each transport: the rows that it moves in a decode step, its latencies and its padding.

`StepCost` is the base class. Rows are counted for one rank in one layer, unless said otherwise. Pairs are
(inside the node, between nodes).
"""

import math
from dataclasses import dataclass

from exflow.comm.capacity import deviations
from exflow.comm.transport_names import Transport
from exflow.cost.workload import StepTraffic, Workload, imbalance_of_batch
from exflow.placement.time.machine import Machine

Pair = tuple[float, float]


@dataclass(frozen=True)
class StepCost:
    """A decode step over one transport. This class sends only the rows that move, and pads nothing."""

    workload: Workload
    traffic: StepTraffic
    machine: Machine

    @property
    def expert_imbalance(self) -> float:
        """Choices that the busiest rank serves in this batch, over the mean."""
        work, drawn = self.workload, self.traffic.drawn
        if drawn is not None:
            return drawn.expert_imbalance
        return imbalance_of_batch(self.traffic.expert_imbalance, work.padded_batch * work.top_k, work.ranks)

    @property
    def attention_imbalance(self) -> float:
        """Tokens that the busiest rank owns in this batch, over the mean.

        It counts as 1 if ranks share their processors, or own only the sequences that they admitted.
        """
        if self.machine.shared or self.traffic.group_size == 1:
            return 1.0
        return imbalance_of_batch(
            self.traffic.attention_imbalance, self.workload.padded_batch, self.workload.ranks
        )

    @property
    def owned_tokens(self) -> float:
        """Tokens whose attention the busiest rank computes."""
        if self.traffic.all_reduces:
            return self.workload.batch
        return self.workload.tokens_per_rank * self.attention_imbalance

    @property
    def group_tokens(self) -> int:
        """Tokens that a rank may own: the tokens that its coherence group admitted."""
        return self.workload.tokens_per_rank * self.traffic.group_size

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a row in a dispatch, with slots, weights and sender, and in a combine."""
        hidden = self.workload.hidden_bytes
        return hidden + 4 * (2 * self.workload.top_k + 3), hidden + 8

    @property
    def combines(self) -> bool:
        """True if partial sums travel in exchanges of their own, besides the dispatches."""
        return self.traffic.exchanges > self.workload.moe_layers

    def latency_s(self) -> float:
        """Seconds of an empty exchange; 0 for a single rank."""
        peers, (inside, between) = self.workload.peers, (self.machine.inside, self.machine.between)
        if self.workload.ranks == 1:
            return 0.0
        if self.workload.other_nodes:
            return between.latency_s + between.peer_s * peers[1]
        return inside.latency_s + inside.peer_s * peers[0]

    def wait(self) -> float:
        """Exchange time of the slowest rank over the mean.

        Between nodes the rows of the busiest link are counted through relays, which these transports do not
        have; so they count only on one node.
        """
        if self.machine.shared:
            return 1.0
        drawn, rows = self.traffic.drawn, sum(self.traffic.dispatch) + sum(self.traffic.combine)
        if drawn is not None and drawn.link_rows is not None and rows and not self.workload.other_nodes:
            return drawn.link_rows / rows
        return max(self.expert_imbalance, self.attention_imbalance)

    def experts_read(self) -> float:
        """Experts that the rank with most reads in an MoE layer; the formula has equally likely experts."""
        work, drawn = self.workload, self.traffic.drawn
        if drawn is not None:
            return drawn.experts_read
        return work.slots_per_rank * (1 - (1 - 1 / work.experts) ** (work.batch * work.top_k))

    def dispatch_rows(self) -> Pair:
        return _times(self.workload.tokens_per_rank, self.traffic.dispatch)

    def combine_rows(self) -> Pair:
        return _times(self.workload.tokens_per_rank, self.traffic.combine)

    def kv_rows(self) -> Pair:
        """Copies of a token's keys and values that a rank sends, in all layers together."""
        tokens = self.workload.tokens_per_rank * self.traffic.attention_imbalance * self.workload.layers
        return _times(tokens, self.traffic.kv)

    def padded_kv_rows(self) -> Pair:
        """`kv_rows` of a collective, which has room for each token that a rank may own."""
        tokens = self.group_tokens * self.workload.layers
        return _times(tokens, self.traffic.kv)

    def all_reduce(self) -> tuple[int, float]:
        """Exchanges of one all-reduce, and rows that a rank sends in it: each token to every other rank."""
        return 1, (self.workload.ranks - 1) * self.workload.batch

    def dense_rows(self) -> float:
        """Rows of dense products: a captured step computes every token that the rank may own."""
        return self.owned_tokens if self.traffic.all_reduces else self.group_tokens

    def positions_read(self) -> float:
        """Positions whose keys and values attention reads."""
        return self.workload.context if self.workload.seen is None else self.workload.seen


class OneSided(StepCost):
    """Captured steps that store rows into the receivers' memory."""

    def all_reduce(self) -> tuple[int, float]:
        """Exchanges and rows of one all-reduce; only the ranks that serve a token send its row."""
        work = self.workload
        served = 1 - (1 - 1 / work.ranks) ** work.top_k
        return 1, (work.ranks - 1) * work.batch * served


class Eager(StepCost):
    """Steps launched one kernel at a time; buffers have room for the expected rows and a margin."""

    def dispatch_rows(self) -> Pair:
        tokens = self.workload.tokens_per_rank
        spare = deviations(self.row_bytes[0], self.machine.round_bytes)
        inside, between = (
            peers * _capacity(tokens, rows / max(peers, 1), spare)
            for rows, peers in zip(self.traffic.dispatch, self.workload.peers, strict=True)
        )
        return inside, between

    def all_reduce(self) -> tuple[int, float]:
        """A ring: every rank passes each part of the rows on twice, to reduce-scatter and to all-gather."""
        return 2, 2 * (self.workload.ranks - 1) / self.workload.ranks * self.workload.batch

    def dense_rows(self) -> float:
        return self.owned_tokens

    def positions_read(self) -> float:
        return self.workload.context


class Collective(StepCost):
    """Captured collectives: every chunk has room for each token that its receiver may own."""

    def wait(self) -> float:
        return 1.0

    def dispatch_rows(self) -> Pair:
        return _times(float(self.group_tokens), self.workload.peers)

    def combine_rows(self) -> Pair:
        return self.dispatch_rows() if self.combines else (0.0, 0.0)

    def kv_rows(self) -> Pair:
        return self.padded_kv_rows()


class Relayed(StepCost):
    """Captured steps whose rows go to a relay in each other node, in chunks of fixed capacity.

    Between nodes a chunk has room for each token that a rank may own. The relay passes rows on inside its
    node, so rows between nodes also count as rows inside.
    """

    def latency_s(self) -> float:
        inside, between = self.machine.inside, self.machine.between
        if self.workload.ranks == 1:
            return 0.0
        inside_s = inside.latency_s + inside.peer_s * self.workload.peers[0]
        if not self.workload.other_nodes:
            return inside_s
        return inside_s + between.latency_s + between.peer_s * self.workload.other_nodes

    def wait(self) -> float:
        return 1.0

    def dispatch_rows(self) -> Pair:
        inside = self.workload.tokens_per_rank * sum(self.traffic.dispatch)
        return inside, self.workload.other_nodes * float(self.group_tokens)

    def combine_rows(self) -> Pair:
        """Rows to the relays if tokens return home; else to every rank that may own a token."""
        if not self.combines:
            return 0.0, 0.0
        chunks = self.workload.other_nodes if self.traffic.group_size == 1 else self.workload.peers[1]
        inside = self.workload.tokens_per_rank * sum(self.traffic.combine)
        return inside, chunks * float(self.group_tokens)

    def kv_rows(self) -> Pair:
        """Copies of keys and values; groups of several nodes gather them by a collective, with padding."""
        several_nodes = self.traffic.group_size > self.workload.ranks_per_node
        return self.padded_kv_rows() if several_nodes else super().kv_rows()


COSTS: dict[Transport, type[StepCost]] = {
    "eager": Eager,
    "one-sided": OneSided,
    "relayed": Relayed,
    "collective": Collective,
}


def _times(tokens: float, rows: Pair) -> Pair:
    return tokens * rows[0], tokens * rows[1]


def _capacity(tokens: float, share: float, spare: float) -> float:
    """Capacity of a buffer, in rows, if each of `tokens` goes there with probability `share`."""
    share = min(share, 1.0)
    return min(tokens, tokens * share + spare * math.sqrt(tokens * share * (1 - share)))
