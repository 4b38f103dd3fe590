from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import (
    Traffic,
    count_traffic,
    follow,
    imbalance,
    local_fraction,
    rank_load,
    total,
)
from exflow.profiling.trace import RoutingTrace


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
    return replicas[waiting.index(owner) % len(replicas)]


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


def plan_of_slots(slots: npt.ArrayLike, topology: Topology, **changes: Any) -> Plan:
    """A plan without a preference among owners, for a model of MoE layers only, but for the `changes`."""
    physical_to_logical_map = np.asarray(slots)
    num_layers = len(physical_to_logical_map)
    known: dict[str, Any] = {
        "model": "",
        "num_hidden_layers": num_layers,
        "moe_layer_ids": tuple(range(num_layers)),
        "num_experts": int(physical_to_logical_map.max()) + 1,
        "next_owner": None,
        "method": "test",
    }
    return Plan(topology=topology, physical_to_logical_map=physical_to_logical_map, **(known | changes))


def make_plan(rank_of_expert: np.ndarray, topology: Topology, **changes: Any) -> Plan:
    """As `plan_of_slots`; each expert has one replica, on this rank."""
    return plan_of_slots(np.argsort(rank_of_expert, axis=1, kind="stable"), topology, **changes)


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


TWO_RANKS = make_plan(np.array([[0, 0, 1, 1]] * 2), Topology(gpus_per_node=2))
# expert 2 of the first layer is on rank 1 alone; expert 0 of the second is on both ranks
MOVING = plan_of_slots([[0, 1, 1, 2], [0, 1, 0, 2]], Topology(gpus_per_node=2))


def messages(
    experts: npt.ArrayLike, plan: Plan, group_size: int, sequence: list[int] | None = None
) -> list[int]:
    """Messages to dispatch and to return."""
    trace = RoutingTrace.from_arrays(experts, num_experts=plan.num_experts, sequence=sequence)
    traffic = count_traffic(trace, plan, group_size)
    return [traffic.dispatched, traffic.returned]


def test_a_token_that_stays_at_home_sends_nothing() -> None:
    assert messages([[0, 1]], TWO_RANKS, 1) == messages([[0, 1]], TWO_RANKS, 2) == [0, 0]


def test_coherent_leaves_the_token_where_its_expert_is() -> None:
    assert messages([[2, 3]], TWO_RANKS, 1) == [2, 2]
    assert messages([[2, 3]], TWO_RANKS, 2) == [1, 0]


def test_the_next_token_starts_where_the_last_one_ended() -> None:
    assert messages([[2, 3], [2, 3]], TWO_RANKS, 2) == [1, 0]
    assert messages([[2, 3], [2, 3]], TWO_RANKS, 2, sequence=[0, 2]) == [
        2,
        0,
    ]  # two sequences, both from rank 0
    assert messages([[2, 3], [0, 0], [2, 3]], TWO_RANKS, 2, sequence=[0, 2, 0]) == [1, 0]  # interleaved


def test_home_is_the_sequence_modulo_the_ranks() -> None:
    assert messages([[2, 3]], TWO_RANKS, 2, sequence=[1]) == [0, 0]


def test_two_experts_on_one_rank_are_one_message() -> None:
    assert messages([[[2, 3], [0, 1]]], TWO_RANKS, 1) == [1, 1]


def test_the_owner_is_the_rank_that_the_next_layer_wants() -> None:
    experts = [[[0, 2], [2, 3]]]  # both ranks, then rank 1 alone
    assert messages(experts, TWO_RANKS, 2) == [2, 1]  # a tie: rank 0 owns, and sends to rank 1 again
    wants_rank_1 = np.tile([0, 1000], (2, 4, 1))
    assert messages(experts, replace(TWO_RANKS, next_owner=wants_rank_1), 2) == [1, 1]


def test_between_nodes_a_token_returns_to_its_group() -> None:
    plan = make_plan(np.array([[0, 1, 2, 3]]), Topology(num_nodes=2, gpus_per_node=2))
    trace = RoutingTrace.from_arrays([[3]], num_experts=4)
    assert count_traffic(trace, plan, 2) == Traffic(1, 1, 1, 0, 1, 0, 1, kv_intra=1, kv_inter=0)
    assert count_traffic(trace, plan, 4) == Traffic(1, 1, 1, 0, 1, 0, 0, kv_intra=1, kv_inter=2)


def test_dense_layers_share_their_context_too() -> None:
    plan = make_plan(
        np.array([[0, 1]]), Topology(num_nodes=2, gpus_per_node=1), moe_layer_ids=(1,), num_hidden_layers=4
    )
    trace = RoutingTrace.from_arrays([[0]], num_experts=2, moe_layer_ids=[1], num_hidden_layers=4)
    assert count_traffic(trace, plan, 2).kv_inter == 4


def test_the_nearest_replica_serves() -> None:
    """Expert 0 is on ranks 0 and 3, one on each node; expert 1 on rank 1, expert 2 on rank 2."""
    plan = plan_of_slots([[0, 1, 2, 0]], Topology(num_nodes=2, gpus_per_node=2))
    for sequence, ranks in ((0, [0, 1, 2]), (1, [0, 1, 2]), (2, [3, 1, 2]), (3, [3, 1, 2])):
        trace = RoutingTrace.from_arrays([[0], [1], [2]], num_experts=3, sequence=[sequence] * 3)
        assert rank_load(trace, plan, 1).tolist() == [[ranks.count(rank) for rank in range(4)]]


def test_the_owner_of_now_decides_which_replica_serves() -> None:
    assert messages([[2, 0]], MOVING, 1) == [1, 1]
    assert messages([[2, 0]], MOVING, 2) == [1, 0]


def test_a_plan_with_all_experts_everywhere_moves_nothing() -> None:
    plan = plan_of_slots([[0, 1, 2, 0, 1, 2]] * 2, Topology(gpus_per_node=2))
    assert messages([[[0, 1], [2, 0]], [[1, 2], [0, 1]]], plan, 1, sequence=[0, 1]) == [0, 0]
    assert messages([[[0, 1], [2, 0]], [[1, 2], [0, 1]]], plan, 2, sequence=[0, 1]) == [0, 0]


def test_remote_nodes_are_counted_once_each() -> None:
    """A token's experts on one, two and three of three nodes, seen from a rank of the first."""
    plan = make_plan(np.array([[0, 1, 2, 3, 4, 5]]), Topology(num_nodes=3, gpus_per_node=2))
    for chosen, nodes in (([0, 1], 0), ([2, 3], 1), ([1, 3, 2], 1), ([3, 4], 2), ([5, 0, 2, 4, 3], 2)):
        trace = RoutingTrace.from_arrays([[chosen]], num_experts=6)
        assert follow(trace, plan, 1).remote_nodes.tolist() == [nodes], chosen
    trace = RoutingTrace.from_arrays([[2], [3], [0], [5]], num_experts=6, sequence=[7, 7, 3, 3])
    assert follow(trace, plan, 1).remote_nodes.tolist() == [2, 2]  # at home on the ranks 3 and 1
    assert follow(trace, plan, 6).remote_nodes.tolist() == [2, 1]  # sequence 7 stays where expert 2 was


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
    """But for whose turn it is at which replica."""
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


def test_load_and_locality_of_a_small_trace() -> None:
    trace = RoutingTrace.from_arrays([[[0, 1], [0, 1]], [[0, 2], [2, 0]]], num_experts=4)
    assert rank_load(trace, TWO_RANKS).tolist() == [[3, 1], [3, 1]]
    assert imbalance(trace, TWO_RANKS).tolist() == [1.5, 1.5]
    assert local_fraction(trace, TWO_RANKS).tolist() == [0.5]  # the second token's first choice moves


def test_load_is_that_of_the_strategy_unless_said_otherwise() -> None:
    trace = RoutingTrace.from_arrays([[2, 0]], num_experts=3)
    assert rank_load(trace, MOVING).tolist() == rank_load(trace, MOVING, 2).tolist() == [[0, 1], [0, 1]]
    at_home = replace(MOVING, strategy="dispatch-combine")
    assert rank_load(trace, at_home).tolist() == rank_load(trace, MOVING, 1).tolist() == [[0, 1], [1, 0]]
    assert imbalance(trace, at_home).tolist() == imbalance(trace, MOVING, 1).tolist() == [2.0, 2.0]


def test_replicas_on_one_rank_make_a_move_local() -> None:
    plan = plan_of_slots([[0, 1, 1, 2], [0, 2, 1, 2]], Topology(gpus_per_node=2))
    trace = RoutingTrace.from_arrays([[0, 2], [1, 1], [1, 0], [2, 0]], num_experts=3)
    assert local_fraction(trace, plan).tolist() == [0.75]  # 2 is on rank 1 alone, 0 on rank 0


def test_a_group_size_that_does_not_split_the_ranks_is_refused() -> None:
    trace = RoutingTrace.from_arrays([[0, 1]], num_experts=4)
    for group_size in (0, 3):
        with pytest.raises(InputError) as error:
            count_traffic(trace, TWO_RANKS, group_size)
        assert str(error.value) == (
            f"group size {group_size} does not split 2 ranks into equal groups; choose a divisor of 2"
        )


def test_a_trace_of_another_model_is_refused() -> None:
    trace = RoutingTrace.from_arrays([[0, 1]], num_experts=8)
    for count in (lambda: count_traffic(trace, TWO_RANKS, 1), lambda: rank_load(trace, TWO_RANKS)):
        with pytest.raises(
            InputError, match="the plan is for 4 experts a layer, the trace has 8; use a plan"
        ):
            count()
