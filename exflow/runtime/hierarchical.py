"""Expert parallelism over several nodes with one message per token and remote node.

A token with experts on another node goes there once, to the rank with the owner's place (the token's relay
there), which passes it on inside the node. Partial sums take the way back: the ranks of a node send theirs to
the relay, which sends their sum to the next owner. In its own node the owner is the relay. A layer has four
exchanges instead of two; two of them are inside nodes.

Shapes: T tokens at hand, P of them relayed here (or owned), D hidden, G ranks, R ranks of a node.
"""

import torch
from torch import Tensor

from exflow.comm.capacity import ROUND_BYTES, CapacityEstimator
from exflow.comm.collectives import Exchange, pack, unpack
from exflow.job.cluster import Cluster, coherence_group
from exflow.model.decoder import MoE, Rows
from exflow.runtime.expert_parallel import ExpertParallel, PlanTables, Tokens


class HierarchicalParallel(ExpertParallel):
    """ExpertParallel whose tokens travel by relays; owners are chosen as without relays.

    No counts are exchanged here either. A token's slots tell its relay which ranks send it partial sums, and
    tell the next owner which relays send it sums.
    """

    def __init__(self, exchange: Exchange, tables: PlanTables, group_size: int) -> None:
        cluster = exchange.cluster
        self.per_node = cluster.ranks_per_node
        self.place = cluster.rank % self.per_node
        self.first = cluster.rank - self.place
        node = Cluster(self.place, self.per_node, self.per_node, cluster.device)
        self.inside = Exchange(node, group=coherence_group(cluster, self.per_node))
        super().__init__(exchange, tables, group_size)

    def begin_request(self) -> None:
        super().begin_request()
        round_bytes = ROUND_BYTES[self.exchange.cluster.device.type]
        self.estimator_inside = CapacityEstimator(self.place, self.per_node, round_bytes)

    def moe(self, layer: MoE, hidden_TD: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        self.inside.counters = self.exchange.counters
        mine, hosts_TG = self.routed(layer, hidden_TD, rows)
        relayed = self.dispatch(layer.index, mine, self.relays(hosts_TG))
        here, senders, answers = self.pass_on(layer.index, relayed)
        local_TK = self.tables.local(here.slot_TK, self.rank)
        partial_TD = layer.experts(layer.norm(here.hidden_TD), local_TK, here.weight_TK)
        self.collect(here, partial_TD, senders, answers)
        relay_T = torch.cat([torch.full_like(relayed.owner_T, self.place), senders])
        return self.bring_home(here, partial_TD, relay_T, len(relayed.owner_T), rows.phase)

    def relays(self, hosts_TG: Tensor) -> Tensor:
        """Mask [T, G] bool: True if a rank is the relay of this rank's token in a node that serves it."""
        relays_TG = torch.zeros_like(hosts_TG)
        relays_TG[:, self.place :: self.per_node] = hosts_TG.unflatten(1, (-1, self.per_node)).any(dim=2)
        return relays_TG

    def pass_on(self, layer: int, relayed: Tokens) -> tuple[Tokens, Tensor, list[int]]:
        """Send the tokens at hand to the other ranks of this node that serve them.

        Returns the tokens followed by the received ones; the place of the sender of each received token; and
        how many partial sums each rank of the node will send: one for each token given to it, except the
        tokens that it owns next.
        """
        inside = slice(self.first, self.first + self.per_node)
        hosts_TR = self.tables.hosting(relayed.slot_TK, self.num_ranks)[:, inside]
        hosts_TR[:, self.place] = False
        token_N, dest_N = hosts_TR.nonzero(as_tuple=True)
        packed = relayed.pack(token_N)
        owned = self.history[-2]  # before this layer; a relay serves the owners at its place
        most = [sum(owned[place :: self.per_node]) for place in range(self.per_node)]
        capacity = self.estimator_inside.capacity(layer, most, packed.shape[1])
        arrived = self.inside.dispatch(packed, dest_N, [], capacity, relayed.hidden_TD[:1].nbytes)
        self.estimator_inside.observe(layer, most, arrived.sent, arrived.came)
        answering_N = relayed.owner_T[token_N] != dest_N + self.first
        answers = torch.bincount(dest_N[answering_N], minlength=self.per_node).tolist()
        came = torch.tensor(arrived.came, device=dest_N.device)
        senders = torch.arange(self.per_node, device=dest_N.device).repeat_interleave(came)
        return relayed.and_received(arrived.rows_MB), senders, answers

    def collect(self, here: Tokens, partial_TD: Tensor, senders: Tensor, answers: list[int]) -> None:
        """Send partial sums of received tokens to their relays; add arriving ones to the relayed tokens."""
        relayed = len(here.owner_T) - len(senders)
        back_N = (here.owner_T[relayed:] != self.rank).nonzero()[:, 0]
        rows_NB = pack(partial_TD[relayed:][back_N], here.key_T[relayed:][back_N, None])
        came_MB = self.inside.combine(rows_NB, senders[back_N], answers, partial_TD[:1].nbytes)
        came_MD, key_M1 = unpack(came_MB, (partial_TD.dtype, partial_TD.shape[1]), (torch.int64, 1))
        add_by_key(partial_TD[:relayed], here.key_T[:relayed], came_MD, key_M1[:, 0])

    def bring_home(
        self, here: Tokens, partial_TD: Tensor, relay_T: Tensor, relayed: int, phase: int
    ) -> tuple[Tensor, Rows]:
        """Send the sums of relayed tokens to the tokens' next owners, which add them up.

        Returns the rows that this rank owns, ordered by sequence and position. relay_T: the place of a
        token's relays in every node. relayed: number of tokens relayed here, which come first.
        """
        hosts_TNR = self.tables.hosting(here.slot_TK, self.num_ranks).unflatten(1, (-1, self.per_node))
        # a relay sends a sum unless only the owner serves the token in its node
        others_TNR = (
            hosts_TNR.flatten(1).scatter(1, here.owner_T[:, None], False).unflatten(1, hosts_TNR.shape[1:])
        )
        says_TN = others_TNR.any(dim=2)
        keep_T = here.owner_T == self.rank
        send_N = (says_TN[:relayed, self.first // self.per_node] & ~keep_T[:relayed]).nonzero()[:, 0]
        nodes_N = torch.arange(says_TN.shape[1], device=relay_T.device)
        relays_KN = nodes_N * self.per_node + relay_T[keep_T][:, None]
        come = torch.bincount(relays_KN[says_TN[keep_T]], minlength=self.num_ranks).tolist()
        come[self.rank] = 0
        returned_MB = self.exchange.combine(
            pack(partial_TD[send_N], here.key_T[send_N, None]),
            here.owner_T[send_N],
            come,
            partial_TD[:1].nbytes,
        )
        came_MD, key_M1 = unpack(returned_MB, (partial_TD.dtype, partial_TD.shape[1]), (torch.int64, 1))
        key_T, order_T = here.key_T[keep_T].sort()
        hidden_TD = (here.hidden_TD + partial_TD)[keep_T][order_T]
        add_by_key(hidden_TD, key_T, came_MD, key_M1[:, 0])
        return hidden_TD, Rows(key_T >> 32, key_T & 0xFFFFFFFF, phase)


def add_by_key(sums_TD: Tensor, key_T: Tensor, added_MD: Tensor, key_M: Tensor) -> None:
    """Add each row of added_MD to the row of sums_TD with its key, in place; keys in key_T are unique."""
    sorted_T, order_T = key_T.sort()
    sums_TD.index_add_(0, order_T[torch.searchsorted(sorted_T, key_M)], added_MD)
