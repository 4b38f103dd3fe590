"""Counts traffic, in one place for all callers: every message that a trace causes under a plan and a
coherence group size.

Shapes: T tokens, L MoE layers, K = top_k, E experts, G ranks.

Example. Experts 0 and 1 live on rank 0, experts 2 and 3 on rank 1; a sequence at home on rank 0 selects
expert 2 in layer 0 and expert 3 in layer 1. Dispatch-combine (group size 1) brings it home after each layer:
2 messages to dispatch, 2 to return. Coherent (group size 2) leaves it on rank 1 after the first: 1 message.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.compiled import compiled
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Traffic:
    """Totals over all tokens and layers of a trace; a message is one hidden state from one GPU to another.

    K/V copies are counted over all `attention_layers` (dense and MoE), messages over the MoE layers.
    """

    tokens: int
    moe_layers: int
    attention_layers: int
    dispatch_intra: int
    dispatch_inter: int
    return_intra: int
    return_inter: int
    kv_intra: int
    kv_inter: int

    @property
    def dispatched(self) -> int:
        return self.dispatch_intra + self.dispatch_inter

    @property
    def returned(self) -> int:
        return self.return_intra + self.return_inter

    @property
    def intra_node(self) -> int:
        return self.dispatch_intra + self.return_intra

    @property
    def inter_node(self) -> int:
        return self.dispatch_inter + self.return_inter

    @property
    def messages(self) -> int:
        return self.dispatched + self.returned

    def per_token_layer(self, messages: int) -> float:
        """A total of messages as a mean per token and MoE layer."""
        return messages / (self.tokens * self.moe_layers)

    def per_token_attention(self, copies: int) -> float:
        """A total of K/V copies as a mean per token and attention layer."""
        return copies / (self.tokens * self.attention_layers)


@dataclass(frozen=True, eq=False)
class Followed:
    """Counts from following a trace through a plan, by sequence, so that sequences can be drawn anew.

    N sequences, in ascending order of their ids.
    """

    tokens: npt.NDArray[np.int64]  # [N] rows of each sequence
    messages: npt.NDArray[np.int64]  # [N, 2, 2] dispatch or return, intra-node or inter-node
    remote_nodes: npt.NDArray[np.int64]  # [N] nodes without the owner that a token's experts are on, summed
    load: npt.NDArray[np.int64]  # [B, L, G] (token, choice) pairs each rank computes, by block of sequences
    block: npt.NDArray[np.int64]  # [N] the block that a sequence's load is counted in
    owned: npt.NDArray[np.int64]  # [L + 1, G] tokens each rank owns before each MoE layer, and after the last
    attended: npt.NDArray[np.int64]  # [G] attention layers computed


def count_traffic(trace: RoutingTrace, plan: Plan, group_size: int, hierarchical: bool = False) -> Traffic:
    """Follow every row of the trace through the layers and count what crosses between GPUs.

    A sequence is at home on the rank "sequence id modulo G", and its tokens may be owned by the ranks of the
    home's coherence group: the block of `group_size` consecutive ranks that it lies in. Group size 1 is
    dispatch-combine, G coherent, `gpus_per_node` coherent inside the node. In each layer the owner sends the
    hidden state to the other ranks that serve it for the selected experts (`serving_slots`); then the next
    owner is chosen among those of them that lie in the group, by the largest sum of the plan's `next_owner`
    over the selected experts (ties to the lowest rank), or stays where none does; the other hosts return
    their results to it. A sequence's first row starts at home, a later one where the row before it ended.

    `hierarchical`: one message goes to each remote node that serves the token, to the rank with the owner's
    place in that node, which passes it on inside; what the ranks of a node contribute is summed by that rank
    (in its own node by the owner before) and goes to the next owner in one message.

    Rows are counted in the order given, all of them: select those of one phase first if only that is meant.
    Raises InputError if the trace does not fit the plan, or `group_size` does not divide the ranks.
    """
    return total(follow(trace, plan, group_size, hierarchical=hierarchical), plan, group_size)


def follow(
    trace: RoutingTrace, plan: Plan, group_size: int, blocks: int = 1, hierarchical: bool = False
) -> Followed:
    """Counts of `count_traffic` by sequence; loads by block of sequences, `blocks` of them (loads take
    memory)."""
    plan.check_trace(trace)
    if group_size < 1 or plan.num_ranks % group_size:
        raise InputError(
            f"group size {group_size} does not split {plan.num_ranks} ranks into equal groups; "
            f"choose a divisor of {plan.num_ranks}"
        )
    sequence_ids, sequence = np.unique(trace.sequence, return_inverse=True)
    block = np.arange(len(sequence_ids)) % blocks
    next_owner = plan.next_owner
    if next_owner is None:
        next_owner = np.zeros((plan.num_layers, plan.num_experts, plan.num_ranks), dtype=np.int16)
    messages, remote, load, owned = _follow(
        np.asarray(trace.experts),  # a plain view: numba reads a memory map without copying it
        sequence,
        block,
        blocks,
        sequence_ids.astype(np.int64) % plan.num_ranks,
        (plan.serving_slot // plan.slots_per_rank).astype(np.int16),  # narrow: more of them stay in the cache
        next_owner.astype(np.int16),
        group_size,
        plan.topology.node_of_rank,
        plan.topology.gpus_per_node if hierarchical else 0,
    )
    attended = _attention_before(plan) @ owned
    tokens = np.bincount(sequence, minlength=len(sequence_ids))
    return Followed(tokens, messages, remote, load, block, owned, attended)


def total(followed: Followed, plan: Plan, group_size: int) -> Traffic:
    """Sums of `followed` over all sequences."""
    kv_copies = followed.attended @ _kv_copies(plan.topology, group_size)
    totals = [*followed.messages.sum(axis=0).ravel().tolist(), *kv_copies.tolist()]
    return Traffic(int(followed.tokens.sum()), plan.num_layers, plan.num_hidden_layers, *totals)


def rank_load(trace: RoutingTrace, plan: Plan, group_size: int | None = None) -> npt.NDArray[np.int64]:
    """[L, G] (token, choice) pairs that each rank computes, over all top_k choices.

    Where experts have replicas it matters which owner asks, so the tokens are followed, in coherence groups
    of `group_size`; by default in those that the plan was made for.
    """
    return np.asarray(follow(trace, plan, group_size or plan.group_size).load.sum(axis=0))


def imbalance(trace: RoutingTrace, plan: Plan, group_size: int | None = None) -> npt.NDArray[np.float64]:
    """[L] the busiest rank's load over the mean load; 1 is perfect balance, G is all on one rank."""
    return imbalance_of(rank_load(trace, plan, group_size))


def imbalance_of(load: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """[..., L]: the busiest rank's load over the mean load, from the loads [..., L, G]."""
    return np.asarray(load.max(axis=-1) / load.mean(axis=-1), dtype=np.float64)


def local_fraction(trace: RoutingTrace, plan: Plan) -> npt.NDArray[np.float64]:
    """[L-1] share of the tokens whose first choices in layers l and l + 1 have a replica on one rank."""
    plan.check_trace(trace)
    hosts, first = plan.hosts.astype(np.float32), trace.experts[:, :, 0]
    together = hosts[:-1] @ hosts[1:].transpose(0, 2, 1) > 0  # [L-1, E, E]
    boundaries = range(plan.num_layers - 1)
    return np.array([together[i, first[:, i], first[:, i + 1]].mean() for i in boundaries])


def _attention_before(plan: Plan) -> npt.NDArray[np.int64]:
    """[L + 1] attention layers, dense ones too, before each MoE layer's experts, and after the last one's."""
    return np.diff([-1, *plan.moe_layer_ids, plan.num_hidden_layers - 1])


def _kv_copies(topology: Topology, group_size: int) -> npt.NDArray[np.int64]:
    """[G, 2] for each rank the other ranks of its coherence group: those on its node, those elsewhere."""
    group, node = np.arange(topology.num_ranks) // group_size, topology.node_of_rank
    inside = ((group[:, None] == group) & (node[:, None] == node)).sum(axis=1)
    return np.stack([inside - 1, group_size - inside], axis=1)


def owners(trace: RoutingTrace, plan: Plan, group_size: int) -> npt.NDArray[np.int16]:
    """[T, L + 1] int16: the rank that owns each token before each MoE layer, and after the last."""
    sequence_ids, sequence = np.unique(trace.sequence, return_inverse=True)
    next_owner = plan.next_owner
    if next_owner is None:
        next_owner = np.zeros((plan.num_layers, plan.num_experts, plan.num_ranks), dtype=np.int16)
    return _owners(
        np.asarray(trace.experts),
        sequence,
        sequence_ids.astype(np.int64) % plan.num_ranks,
        (plan.serving_slot // plan.slots_per_rank).astype(np.int16),
        next_owner.astype(np.int16),
        group_size,
    )


@compiled
def _owners(
    experts: IntArray,  # [T, L, K]
    sequence: IntArray,  # [T]
    home: IntArray,  # [sequences] rank
    serving: IntArray,  # [G, L, E]
    next_owner: IntArray,  # [L, E, G]
    group_size: int,
) -> npt.NDArray[np.int16]:
    num_tokens, num_layers, top_k = experts.shape
    found = np.empty((num_tokens, num_layers + 1), dtype=np.int16)
    load, hosts = np.zeros(len(serving), dtype=np.int64), np.empty(top_k, dtype=np.int64)
    owner_of = home.copy()
    for token in range(num_tokens):
        owner = owner_of[sequence[token]]
        for layer in range(num_layers):
            found[token, layer] = owner
            chosen = experts[token, layer]
            present = hosts[: distinct_hosts(chosen, serving[owner, layer], load, hosts)]
            owner = choose_owner(owner, present, chosen, next_owner[layer], group_size)
        found[token, num_layers] = owner_of[sequence[token]] = owner
    return found


@compiled
def _follow(
    experts: IntArray,  # [T, L, K]
    sequence: IntArray,  # [T] 0, 1, ... without gaps
    block: IntArray,  # [sequences] below num_blocks
    num_blocks: int,
    home: IntArray,  # [sequences] rank
    serving: IntArray,  # [G, L, E] the rank that an owner's tokens go to
    next_owner: IntArray,  # [L, E, G]
    group_size: int,
    node: IntArray,  # [G]
    relays: int,  # ranks of a node, each the relay of those with its place elsewhere; 0: none
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The fields messages, remote_nodes, load and owned of `Followed`."""
    num_tokens, num_layers, top_k = experts.shape
    messages = np.zeros((len(home), 2, 2), dtype=np.int64)
    remote = np.zeros(len(home), dtype=np.int64)
    load = np.zeros((num_blocks, num_layers, len(node)), dtype=np.int64)
    owned = np.zeros((num_layers + 1, len(node)), dtype=np.int64)
    hosts = np.empty(top_k, dtype=np.int64)
    owner_of = home.copy()
    for token in range(num_tokens):
        of = sequence[token]
        owner, held = owner_of[of], load[block[of]]
        for layer in range(num_layers):
            owned[layer, owner] += 1
            chosen = experts[token, layer]
            present = hosts[: distinct_hosts(chosen, serving[owner, layer], held[layer], hosts)]
            before, owner = owner, choose_owner(owner, present, chosen, next_owner[layer], group_size)
            if relays:
                remote[of] += _send_by_relays(before, owner, present, relays, messages[of])
            else:
                remote[of] += _send(before, present, node, messages[of, 0])
                _send(owner, present, node, messages[of, 1])
        owned[num_layers, owner] += 1
        owner_of[of] = owner
    return messages, remote, load, owned


@compiled
def distinct_hosts(chosen: IntArray, serving: IntArray, load: IntArray, hosts: IntArray) -> int:
    """Write the ranks that serve the `chosen` experts [K], each once, to the front of `hosts` [K]; count
    them."""
    count = 0
    for expert in chosen:
        rank = serving[expert]
        load[rank] += 1
        if rank not in hosts[:count]:
            hosts[count] = rank
            count += 1
    return count


@compiled
def _send(owner: int, hosts: IntArray, node: IntArray, messages: IntArray) -> int:
    """Count a message between the owner and every other host: intra-node in messages[0], inter in [1].

    Returns how many nodes other than the owner's the hosts are on.
    """
    remote = 0
    for i in range(len(hosts)):
        host = hosts[i]
        if host != owner:
            messages[int(node[host] != node[owner])] += 1
        if node[host] != node[owner]:
            remote += 1
            for other in hosts[:i]:
                if node[other] == node[host]:
                    remote -= 1
                    break
    return remote


@compiled
def _send_by_relays(before: int, owner: int, hosts: IntArray, per_node: int, messages: IntArray) -> int:
    """Count a token's messages to its hosts, by one relay in each node, and back to its next owner.

    messages [2, 2]: dispatch or return, intra-node or inter-node. Returns the remote nodes served.
    """
    remote = 0
    for i in range(len(hosts)):
        node = hosts[i] // per_node
        first = True
        for other in hosts[:i]:
            if other // per_node == node:
                first = False
        if not first:
            continue  # the node has been counted
        relay = node * per_node + before % per_node
        says = False
        for host in hosts[i:]:
            if host // per_node == node:
                messages[0, 0] += int(host != relay)
                messages[1, 0] += int(host != relay and host != owner)
                says = says or host != owner
        if relay != before:
            messages[0, 1] += 1
            remote += 1
        if says and relay != owner:
            messages[1, int(owner // per_node != node)] += 1
    return remote


@compiled
def choose_owner(owner: int, hosts: IntArray, chosen: IntArray, next_owner: IntArray, group_size: int) -> int:
    """The host in the owner's group with the largest score, ties to the lowest rank; else the owner stays."""
    best, best_score = owner, -1
    for host in hosts:
        if host // group_size == owner // group_size:
            score = 0
            for expert in chosen:
                score += next_owner[expert, host]
            if score > best_score or (score == best_score and host < best):
                best, best_score = host, score
    return best
