"""MoE layers of eager steps over several ranks: route, dispatch, run the experts, combine.

Gates choose logical experts. The owner of a token maps each choice to one slot (a physical expert), and every
rank runs its own slots. So each choice is computed once, whatever the replicas.

Shapes: T tokens at hand, D hidden, K choices, E experts, L MoE layers, G ranks.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from exflow.comm.capacity import ROUND_BYTES, CapacityEstimator
from exflow.comm.collectives import Exchange, pack, unpack
from exflow.model.decoder import MoE, Rows
from exflow.placement.plan.plan import Plan

ELSEWHERE = -1


@dataclass(frozen=True)
class PlanTables:
    """A plan as tensors on a rank's device.

    serving_slot [G, L, E] int64 (Plan.serving_slot); next_owner [L, E, G] int64 per mille (Plan.next_owner);
    rank r has the physical slots r * slots_per_rank and up.
    """

    serving_slot: Tensor
    next_owner: Tensor
    slots_per_rank: int

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> Self:
        serving = torch.from_numpy(plan.serving_slot)
        if plan.next_owner is None:
            owners = torch.zeros(*serving.shape[1:], plan.num_ranks, dtype=torch.int64)
        else:
            owners = torch.from_numpy(plan.next_owner).long()
        return cls(serving.to(device), owners.to(device), plan.slots_per_rank)

    def hosts(self, slot_TK: Tensor) -> Tensor:
        """The rank that has each physical slot [T, K] int64."""
        return slot_TK // self.slots_per_rank

    def hosting(self, slot_TK: Tensor, num_ranks: int) -> Tensor:
        """Mask [T, G] bool: True if a rank has one of a token's physical slots."""
        hosts_TG = torch.zeros(len(slot_TK), num_ranks, dtype=torch.bool, device=slot_TK.device)
        return hosts_TG.scatter_(1, self.hosts(slot_TK), True)

    def local(self, slot_TK: Tensor, rank: int) -> Tensor:
        """Slots [T, K] of `rank` counted from its first one; ELSEWHERE for slots of other ranks."""
        return (slot_TK - rank * self.slots_per_rank).where(self.hosts(slot_TK) == rank, ELSEWHERE)


class Replicated:
    """MoELayout in which every rank has every token; one all-reduce sums the ranks' partial sums.

    If an expert has replicas, the one that serves the token's home runs.
    """

    def __init__(self, exchange: Exchange, tables: PlanTables) -> None:
        self.exchange = exchange
        self.tables = tables
        self.rank = exchange.cluster.rank
        self.num_ranks = exchange.cluster.num_ranks

    def moe(self, layer: MoE, hidden_TD: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        normed_TD = layer.norm(hidden_TD)
        routing = layer.route(normed_TD, rows)
        home_T1 = (rows.sequence_T % self.num_ranks)[:, None]
        slot_TK = self.tables.serving_slot[home_T1, layer.index, routing.expert_TK]
        partial_TD = layer.experts(normed_TD, self.tables.local(slot_TK, self.rank), routing.weight_TK)
        return hidden_TD + self.exchange.all_reduce(partial_TD), rows


@dataclass(frozen=True)
class Tokens:
    """The tokens at hand, with all fields that travel in a dispatch.

    hidden_TD: the residual stream before the layer (the receiver repeats the norm). slot_TK: the physical
    slots that serve a token. owner_T: the rank that owns a token after the layer.
    """

    hidden_TD: Tensor
    weight_TK: Tensor
    slot_TK: Tensor
    sequence_T: Tensor
    position_T: Tensor
    owner_T: Tensor

    @property
    def key_T(self) -> Tensor:
        """Sort key of each token [T] int64, by sequence, then position."""
        return self.sequence_T << 32 | self.position_T

    def pack(self, take: Tensor) -> Tensor:
        """The tokens with indices `take` as rows of bytes."""
        whole = torch.cat(
            [self.slot_TK, self.sequence_T[:, None], self.position_T[:, None], self.owner_T[:, None]], dim=1
        )
        return pack(self.hidden_TD[take], self.weight_TK[take], whole[take].to(torch.int32))

    def and_received(self, rows_MB: Tensor) -> "Tokens":
        """These tokens followed by received ones."""
        width, choices = self.hidden_TD.shape[1], self.slot_TK.shape[1]
        hidden, weight, whole = unpack(
            rows_MB,
            (self.hidden_TD.dtype, width),
            (self.weight_TK.dtype, choices),
            (torch.int32, choices + 3),
        )
        slot, sequence, position, owner = whole.long().split([choices, 1, 1, 1], dim=1)
        return Tokens(
            torch.cat([self.hidden_TD, hidden]),
            torch.cat([self.weight_TK, weight]),
            torch.cat([self.slot_TK, slot]),
            torch.cat([self.sequence_T, sequence[:, 0]]),
            torch.cat([self.position_T, position[:, 0]]),
            torch.cat([self.owner_T, owner[:, 0]]),
        )


class ExpertParallel:
    """MoELayout in which each token has one owner: it travels to its experts, and may stay with one of them.

    The `group_size` ranks of a coherence group share the context of their sequences, so any of them may own
    a token. A group of one rank is dispatch-combine, of a node's ranks node-coherent, of all ranks ExFlow's
    coherent strategy. Counts are never exchanged alone: every dispatch carries how many tokens the sender
    owns, and how many of them each rank will own. So every rank knows how many tokens each rank owns, from
    which follows the capacity of the next dispatch. A token's next owner knows from its slots which ranks
    send it partial sums.
    """

    def __init__(self, exchange: Exchange, tables: PlanTables, group_size: int) -> None:
        self.exchange = exchange
        self.tables = tables
        self.group_size = group_size
        self.rank = exchange.cluster.rank
        self.num_ranks = exchange.cluster.num_ranks
        self.begin_request()
        self.history: list[list[int]] = []

    def begin_request(self) -> None:
        round_bytes = ROUND_BYTES[self.exchange.cluster.device.type]
        self.estimator = CapacityEstimator(self.rank, self.num_ranks, round_bytes)

    def begin(self, owned: list[int]) -> None:
        """Start a forward pass in which rank r owns at most owned[r] tokens."""
        self.history = [owned]

    @property
    def owned(self) -> list[int]:
        """Number of tokens that each rank owns now; an upper bound until the first dispatch of the pass."""
        return self.history[-1]

    def moe(self, layer: MoE, hidden_TD: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        mine, hosts_TG = self.routed(layer, hidden_TD, rows)
        here = self.dispatch(layer.index, mine, hosts_TG)
        local_TK = self.tables.local(here.slot_TK, self.rank)
        partial_TD = layer.experts(layer.norm(here.hidden_TD), local_TK, here.weight_TK)
        return self.combine(here, partial_TD, local_TK, rows.phase)

    def routed(self, layer: MoE, hidden_TD: Tensor, rows: Rows) -> tuple[Tokens, Tensor]:
        """Route this rank's tokens. Returns them with slots and next owners, and the ranks that serve them.

        The second result is a mask [T, G] bool.
        """
        routing = layer.route(layer.norm(hidden_TD), rows)
        slot_TK = self.tables.serving_slot[self.rank, layer.index][routing.expert_TK]
        hosts_TG = self.tables.hosting(slot_TK, self.num_ranks)
        owner_T = self.choose_owners(layer.index, routing.expert_TK, hosts_TG, rows.sequence_T)
        mine = Tokens(hidden_TD, routing.weight_TK, slot_TK, rows.sequence_T, rows.position_T, owner_T)
        return mine, hosts_TG

    def choose_owners(self, layer: int, expert_TK: Tensor, hosts_TG: Tensor, sequence_T: Tensor) -> Tensor:
        """Next owner of each token [T] int64.

        It is the rank most likely to host the token's next experts, among the ranks that serve the token now
        and are in its home's coherence group; the lowest such rank among equals. Without any such rank the
        token stays on this one.
        """
        ranks_G = torch.arange(self.num_ranks, device=expert_TK.device)
        home_T = sequence_T % self.num_ranks
        group_TG = ranks_G // self.group_size == (home_T // self.group_size)[:, None]
        score_TG = self.tables.next_owner[layer][expert_TK].sum(dim=1) * self.num_ranks - ranks_G
        candidates_TG = hosts_TG & group_TG
        best_T = score_TG.masked_fill(~candidates_TG, torch.iinfo(torch.int64).min).argmax(dim=1)
        return best_T.where(candidates_TG.any(dim=1), self.rank)

    def dispatch(self, layer: int, mine: Tokens, to_TG: Tensor) -> Tokens:
        """Send this rank's tokens to the other ranks marked in to_TG [T, G] bool.

        Returns `mine` followed by the received tokens.
        """
        away_TG = to_TG.clone()
        away_TG[:, self.rank] = False
        token_N, dest_N = away_TG.nonzero(as_tuple=True)
        owners = torch.bincount(mine.owner_T, minlength=self.num_ranks).tolist()
        packed = mine.pack(token_N)
        capacity = self.estimator.capacity(layer, self.owned, packed.shape[1])
        arrived = self.exchange.dispatch(
            packed, dest_N, [len(mine.owner_T), *owners], capacity, mine.hidden_TD[:1].nbytes
        )
        owned, *next_owned = zip(*arrived.notes, strict=True)
        self.history[-1] = list(owned)  # it was an upper bound, too large if sequences have ended
        self.history.append([sum(of_senders) for of_senders in next_owned])
        self.estimator.observe(layer, owned, arrived.sent, arrived.came)
        return mine.and_received(arrived.rows_MB)

    def combine(self, here: Tokens, partial_TD: Tensor, local_TK: Tensor, phase: int) -> tuple[Tensor, Rows]:
        """Send partial sums to the tokens' next owners, which add them up.

        Returns the rows that this rank owns, ordered by sequence and position.
        """
        keep_T = here.owner_T == self.rank
        key_T = here.key_T
        order_T = torch.argsort(key_T[keep_T])
        hidden_TD = (here.hidden_TD + partial_TD)[keep_T][order_T]
        kept_T = key_T[keep_T][order_T]
        if has_return(local_TK.shape[1], self.group_size, self.num_ranks):
            send_N = (~keep_T & (local_TK >= 0).any(dim=1)).nonzero()[:, 0]
            come = self.tables.hosting(here.slot_TK[keep_T], self.num_ranks).sum(dim=0).tolist()
            come[self.rank] = 0
            returned_MB = self.exchange.combine(
                pack(partial_TD[send_N], key_T[send_N, None]),
                here.owner_T[send_N],
                come,
                partial_TD[:1].nbytes,
            )
            partial_MD, key_M1 = unpack(
                returned_MB, (partial_TD.dtype, partial_TD.shape[1]), (torch.int64, 1)
            )
            hidden_TD = hidden_TD.index_add(0, torch.searchsorted(kept_T, key_M1[:, 0]), partial_MD)
        return hidden_TD, Rows(kept_T >> 32, kept_T & 0xFFFFFFFF, phase)


def has_return(top_k: int, group_size: int, num_ranks: int) -> bool:
    """True if partial sums may travel; False if a token's only expert is always on its next owner."""
    return top_k > 1 or group_size < num_ranks
