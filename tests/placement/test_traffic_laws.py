"""Counted traffic against a slow count of the rule itself, and laws that hold for any plan."""

import math
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import (
    Traffic,
    count_traffic,
    follow,
    rank_load,
    total,
)
from exflow.profiling.trace import RoutingTrace
from tests.placement.drawn_plans import make_plan, plan_of_slots


@dataclass
class SlowCount:
    traffic: Traffic
    remote_nodes: dict[int, int]  # by sequence
    load: npt.NDArray[np.int64]  # [L, G]


def slow_serving_rank(plan: Plan, layer: int, expert: int, owner: int) -> int:
    """The rule of docs/plan-format.md, word by word."""
    node = plan.topology.node_of_rank.tolist()
    slots = plan.physical_to_logical_map[layer].tolist()
    replicas = [slot // plan.slots_per_rank for slot in range(plan.num_slots) if slots[slot] == expert]
    if owner in replicas:
        return owner
    near = [rank for rank in replicas if node[rank] == node[owner]]
    if near:
        waiting = [rank for rank in range(plan.num_ranks) if node[rank] == node[owner]]
        waiting = [rank for rank in waiting if rank not in replicas]
        return near[waiting.index(owner) % len(near)]
    nodes = {node[rank] for rank in replicas}
    waiting = [rank for rank in range(plan.num_ranks) if node[rank] not in nodes]
    i, n = waiting.index(owner), len(replicas)
    return replicas[(i + i // math.lcm(plan.topology.gpus_per_node, n)) % n]


def slow_count(trace: RoutingTrace, plan: Plan, group_size: int, hierarchical: bool = False) -> SlowCount:
    """The rule, word by word: sets of ranks, one hidden layer after the other."""
    ranks = range(plan.num_ranks)
    node = plan.topology.node_of_rank.tolist()
    sent = {"dispatch": [0, 0], "return": [0, 0], "kv": [0, 0]}
    owners: dict[int, int] = {}
    remote_nodes = dict.fromkeys(trace.sequence.tolist(), 0)
    load = np.zeros((plan.num_layers, plan.num_ranks), dtype=np.int64)

    def send(kind: str, source: int, target: int) -> None:
        sent[kind][node[source] != node[target]] += 1

    def by_relays(before: int, owner: int, hosts: set[int]) -> None:
        per_node = plan.topology.gpus_per_node
        for there in {node[rank] for rank in hosts}:
            relay, inside = there * per_node + before % per_node, {r for r in hosts if node[r] == there}
            if relay != before:
                send("dispatch", before, relay)
            for rank in inside - {relay}:
                send("dispatch", relay, rank)
            for rank in inside - {relay, owner}:
                send("return", rank, relay)
            if relay != owner and inside - {owner}:
                send("return", relay, owner)

    for sequence, token in zip(trace.sequence.tolist(), trace.experts.tolist(), strict=True):
        home = sequence % plan.num_ranks
        group = {rank for rank in ranks if rank // group_size == home // group_size}
        owner = owners.get(sequence, home)
        for hidden in range(plan.num_hidden_layers):
            for rank in group - {owner}:
                send("kv", owner, rank)
            if hidden not in plan.moe_layer_ids:
                continue
            layer = plan.moe_layer_ids.index(hidden)
            serving = [slow_serving_rank(plan, layer, expert, owner) for expert in token[layer]]
            for rank in serving:
                load[layer, rank] += 1
            hosts = set(serving)
            remote_nodes[sequence] += len({node[rank] for rank in hosts} - {node[owner]})
            before = owner
            if hosts & group:
                score = dict.fromkeys(ranks, 0)
                if plan.next_owner is not None:
                    score = {g: sum(int(plan.next_owner[layer, e, g]) for e in token[layer]) for g in ranks}
                owner = min(hosts & group, key=lambda g: (-score[g], g))
            if hierarchical:
                by_relays(before, owner, hosts)
                continue
            for rank in hosts - {before}:
                send("dispatch", before, rank)
            for rank in hosts - {owner}:
                send("return", rank, owner)
        owners[sequence] = owner
    traffic = Traffic(
        trace.num_tokens,
        plan.num_layers,
        plan.num_hidden_layers,
        *sent["dispatch"],
        *sent["return"],
        *sent["kv"],
    )
    return SlowCount(traffic, remote_nodes, load)


def draw_slots(rng: np.random.Generator, num_experts: int, num_slots: int) -> npt.NDArray[np.int64]:
    """One layer's slots: each expert once, any of them in the slots that are left."""
    extra = rng.integers(0, num_experts, num_slots - num_experts)
    return rng.permutation(np.concatenate([np.arange(num_experts), extra]))


@st.composite
def cases(draw: st.DrawFn, max_top_k: int = 3, replicas: bool = True) -> tuple[RoutingTrace, Plan, int]:
    """A trace, a plan, a group size: nodes, dense layers, ties, repeated experts, mixed sequences.

    With replicas come layers of unequal size.
    """
    topology = Topology(num_nodes=draw(st.integers(1, 3)), gpus_per_node=draw(st.integers(1, 3)))
    num_ranks = topology.num_ranks
    num_slots = num_ranks * draw(st.integers(1, 3 if replicas else 2))
    num_experts = draw(st.integers(1, num_slots)) if replicas else num_slots
    moe_layer_ids = sorted(draw(st.sets(st.integers(0, 4), min_size=1, max_size=3)))
    num_hidden_layers = moe_layer_ids[-1] + 1 + draw(st.integers(0, 1))
    shape = (draw(st.integers(0, 12)), len(moe_layer_ids), draw(st.integers(1, max_top_k)))
    score_levels = draw(st.sampled_from([0, 2, 1001]))  # no table, many ties, hardly any
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = np.full(shape[1], num_experts)
    if replicas:
        counts[1:] = rng.integers(1, num_experts + 1, shape[1] - 1)
    trace = RoutingTrace.from_arrays(
        rng.integers(0, counts[:, None], shape),
        num_experts=num_experts,
        experts_per_layer=counts.tolist(),
        sequence=rng.integers(0, 2 * num_ranks, shape[0]),
        moe_layer_ids=moe_layer_ids,
        num_hidden_layers=num_hidden_layers,
    )
    table = rng.integers(0, score_levels, (shape[1], num_experts, num_ranks)) if score_levels else None
    plan = plan_of_slots(
        np.stack([draw_slots(rng, count, num_slots) for count in counts]),
        topology,
        experts_per_layer=tuple(counts.tolist()),
        next_owner=table,
        moe_layer_ids=tuple(moe_layer_ids),
        num_hidden_layers=num_hidden_layers,
    )
    group_size = draw(st.sampled_from([c for c in range(1, num_ranks + 1) if num_ranks % c == 0]))
    return trace, plan, group_size


@settings(deadline=None, max_examples=200)
@given(cases())
def test_the_count_is_the_rule(case: tuple[RoutingTrace, Plan, int]) -> None:
    _, plan, group_size = case
    slow, followed = slow_count(*case), follow(*case)
    assert count_traffic(*case) == total(followed, plan, group_size) == slow.traffic
    assert followed.remote_nodes.tolist() == [slow.remote_nodes[key] for key in sorted(slow.remote_nodes)]
    assert followed.load.tolist() == [slow.load.tolist()]
    assert rank_load(*case).tolist() == slow.load.tolist()
    assert count_traffic(*case, hierarchical=True) == slow_count(*case, hierarchical=True).traffic


@settings(deadline=None, max_examples=50)
@given(cases(), st.integers(1, 4))
def test_every_sequence_is_followed_by_itself(case: tuple[RoutingTrace, Plan, int], blocks: int) -> None:
    trace, plan, group_size = case
    followed = follow(trace, plan, group_size, blocks)
    load, attended = np.zeros_like(followed.load), np.zeros_like(followed.attended)
    for n, sequence in enumerate(np.unique(trace.sequence)):
        alone = follow(trace.select(trace.sequence == sequence), plan, group_size)
        assert followed.tokens[n] == alone.tokens[0] == (trace.sequence == sequence).sum()
        assert followed.messages[n].tolist() == alone.messages[0].tolist()
        assert followed.remote_nodes[n] == alone.remote_nodes[0]
        load[followed.block[n]] += alone.load[0]
        attended += alone.attended
    assert followed.load.tolist() == load.tolist()
    assert followed.attended.tolist() == attended.tolist()


@settings(deadline=None, max_examples=50)
@given(cases())
def test_dispatch_combine_has_a_closed_form(case: tuple[RoutingTrace, Plan, int]) -> None:
    trace, plan, _ = case
    home = trace.sequence % plan.num_ranks
    layer = np.arange(plan.num_layers)[:, None]
    serving = plan.serving_slot[home[:, None, None], layer, trace.experts] // plan.slots_per_rank  # [T, L, K]
    visits = serving[..., None] == np.arange(plan.num_ranks)  # [T, L, K, G]
    away = np.arange(plan.num_ranks) != home[:, None, None]
    wanted = int((visits.any(axis=2) & away).sum())
    traffic = count_traffic(trace, plan, 1)
    assert traffic.dispatched == traffic.returned == wanted
    assert traffic.dispatch_inter == traffic.return_inter
    assert rank_load(trace, plan, 1).tolist() == visits.sum(axis=(0, 2)).tolist()


@settings(deadline=None, max_examples=50)
@given(cases(replicas=False))
def test_coherent_returns_all_partial_results_but_one(case: tuple[RoutingTrace, Plan, int]) -> None:
    trace, plan, _ = case
    hosts = [
        len({int(ranks[e]) for e in chosen})
        for token in trace.experts.tolist()
        for chosen, ranks in zip(token, plan.rank_of_expert, strict=True)
    ]
    assert count_traffic(trace, plan, plan.num_ranks).returned == sum(hosts) - len(hosts)


@settings(deadline=None, max_examples=50)
@given(cases(max_top_k=1))
def test_coherent_top_1_returns_nothing(case: tuple[RoutingTrace, Plan, int]) -> None:
    trace, plan, _ = case
    assert count_traffic(trace, plan, plan.num_ranks).returned == 0


@settings(deadline=None, max_examples=50)
@given(cases())
def test_every_attention_layer_is_copied_to_the_rest_of_the_group(
    case: tuple[RoutingTrace, Plan, int],
) -> None:
    trace, plan, group_size = case
    traffic = count_traffic(trace, plan, group_size)
    copies = (group_size - 1) * trace.num_tokens * plan.num_hidden_layers
    assert traffic.kv_intra + traffic.kv_inter == copies


@settings(deadline=None, max_examples=50)
@given(cases(), st.randoms(use_true_random=False))
def test_the_names_of_experts_do_not_matter(case: tuple[RoutingTrace, Plan, int], random: Random) -> None:
    trace, plan, group_size = case
    layer = np.arange(plan.num_layers)[:, None]
    renamed = np.tile(np.arange(plan.num_experts), (plan.num_layers, 1))  # old name -> new name
    for names, count in zip(renamed, plan.experts_per_layer, strict=True):
        np.random.default_rng(random.getrandbits(32)).shuffle(names[:count])
    other = replace(
        plan,
        physical_to_logical_map=renamed[layer, plan.physical_to_logical_map],
        next_owner=None if plan.next_owner is None else plan.next_owner[layer, np.argsort(renamed, axis=1)],
    )
    moved = replace(trace, experts=renamed[layer, trace.experts].astype(trace.experts.dtype))
    assert count_traffic(moved, other, group_size) == count_traffic(trace, plan, group_size)


@settings(deadline=None, max_examples=50)
@given(cases(replicas=False), st.integers(0, 2**32 - 1))
def test_the_numbers_of_ranks_in_a_node_do_not_matter(
    case: tuple[RoutingTrace, Plan, int], seed: int
) -> None:
    """Ranks' numbers may only change whose turn it is at which replica."""
    trace, plan, _ = case
    num_ranks, gpus = plan.num_ranks, plan.topology.gpus_per_node
    rng = np.random.default_rng(seed)
    renamed = rng.permuted(np.arange(num_ranks).reshape(-1, gpus), axis=1).ravel()  # old rank -> new rank
    liking = rng.permutation(num_ranks)  # distinct, so that no tie is decided by the number of a rank
    table = np.broadcast_to(liking, (plan.num_layers, plan.num_experts, num_ranks))
    plan = replace(plan, next_owner=table)
    other = make_plan(
        renamed[plan.rank_of_expert],
        plan.topology,
        next_owner=table[:, :, np.argsort(renamed)],
        moe_layer_ids=plan.moe_layer_ids,
        num_hidden_layers=plan.num_hidden_layers,
    )
    home = trace.sequence % num_ranks
    moved = replace(trace, sequence=trace.sequence - home + renamed[home].astype(np.int32))
    for group_size in (1, gpus, num_ranks):
        assert count_traffic(moved, other, group_size) == count_traffic(trace, plan, group_size)
