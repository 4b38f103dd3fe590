from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.plan import Plan
from exflow.placement.topology import Topology
from exflow.placement.traffic import Traffic, count_traffic, imbalance, local_fraction, rank_load
from exflow.profiling.trace import RoutingTrace


def slow_count(trace: RoutingTrace, plan: Plan, group_size: int) -> Traffic:
    """The rule, word by word: sets of ranks, one hidden layer after the other."""
    ranks = range(plan.num_ranks)
    node = plan.topology.node_of_rank.tolist()
    rank_of_expert = plan.rank_of_expert.tolist()
    sent = {"dispatch": [0, 0], "return": [0, 0], "kv": [0, 0]}
    owners: dict[int, int] = {}

    def send(kind: str, source: int, target: int) -> None:
        sent[kind][node[source] != node[target]] += 1

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
            hosts = {rank_of_expert[layer][e] for e in token[layer]}
            for rank in hosts - {owner}:
                send("dispatch", owner, rank)
            if hosts & group:
                score = dict.fromkeys(ranks, 0)
                if plan.next_owner is not None:
                    score = {g: sum(int(plan.next_owner[layer, e, g]) for e in token[layer]) for g in ranks}
                owner = min(hosts & group, key=lambda g: (-score[g], g))
            for rank in hosts - {owner}:
                send("return", rank, owner)
        owners[sequence] = owner
    return Traffic(
        trace.num_tokens,
        plan.num_layers,
        plan.num_hidden_layers,
        *sent["dispatch"],
        *sent["return"],
        *sent["kv"],
    )


def make_plan(rank_of_expert: np.ndarray, topology: Topology, **changes: Any) -> Plan:
    """A plan without a preference among owners, for a model of MoE layers only, but for the `changes`."""
    num_layers, num_experts = rank_of_expert.shape
    plan = Plan(
        model="",
        num_hidden_layers=num_layers,
        moe_layer_ids=tuple(range(num_layers)),
        num_experts=num_experts,
        topology=topology,
        physical_to_logical_map=np.argsort(rank_of_expert, axis=1, kind="stable"),
        next_owner=None,
        method="test",
    )
    return replace(plan, **changes)


@st.composite
def cases(draw: st.DrawFn, max_top_k: int = 3) -> tuple[RoutingTrace, Plan, int]:
    """A trace, a plan, a group size: several nodes, dense layers, ties, repeated experts, mixed sequences."""
    topology = Topology(num_nodes=draw(st.integers(1, 3)), gpus_per_node=draw(st.integers(1, 3)))
    num_ranks = topology.num_ranks
    num_experts = num_ranks * draw(st.integers(1, 2))
    moe_layer_ids = sorted(draw(st.sets(st.integers(0, 4), min_size=1, max_size=3)))
    num_hidden_layers = moe_layer_ids[-1] + 1 + draw(st.integers(0, 1))
    shape = (draw(st.integers(0, 12)), len(moe_layer_ids), draw(st.integers(1, max_top_k)))
    score_levels = draw(st.sampled_from([0, 2, 1001]))  # no table, many ties, hardly any
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    trace = RoutingTrace.from_arrays(
        rng.integers(0, num_experts, shape),
        num_experts=num_experts,
        sequence=rng.integers(0, 2 * num_ranks, shape[0]),
        moe_layer_ids=moe_layer_ids,
        num_hidden_layers=num_hidden_layers,
    )
    table = rng.integers(0, score_levels, (shape[1], num_experts, num_ranks)) if score_levels else None
    balanced = np.arange(num_experts) % num_ranks
    plan = make_plan(
        rng.permuted(np.tile(balanced, (shape[1], 1)), axis=1),
        topology,
        next_owner=table,
        moe_layer_ids=tuple(moe_layer_ids),
        num_hidden_layers=num_hidden_layers,
    )
    group_size = draw(st.sampled_from([c for c in range(1, num_ranks + 1) if num_ranks % c == 0]))
    return trace, plan, group_size


TWO_RANKS = make_plan(np.array([[0, 0, 1, 1]] * 2), Topology(gpus_per_node=2))


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


@settings(deadline=None, max_examples=200)
@given(cases())
def test_the_count_is_the_rule(case: tuple[RoutingTrace, Plan, int]) -> None:
    assert count_traffic(*case) == slow_count(*case)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_dispatch_combine_has_a_closed_form(case: tuple[RoutingTrace, Plan, int]) -> None:
    trace, plan, _ = case
    layer = np.arange(plan.num_layers)[:, None]
    visits = plan.rank_of_expert[layer, trace.experts][..., None] == np.arange(plan.num_ranks)  # [T, L, K, G]
    away = np.arange(plan.num_ranks) != trace.sequence[:, None, None] % plan.num_ranks
    wanted = int((visits.any(axis=2) & away).sum())
    traffic = count_traffic(trace, plan, 1)
    assert traffic.dispatched == traffic.returned == wanted
    assert traffic.dispatch_inter == traffic.return_inter


@settings(deadline=None, max_examples=50)
@given(cases())
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
    identity = np.tile(np.arange(plan.num_experts), (plan.num_layers, 1))
    renamed = np.random.default_rng(random.getrandbits(32)).permuted(identity, axis=1)  # old name -> new name
    other = replace(
        plan,
        physical_to_logical_map=renamed[layer, plan.physical_to_logical_map],
        next_owner=None if plan.next_owner is None else plan.next_owner[layer, np.argsort(renamed, axis=1)],
    )
    moved = replace(trace, experts=renamed[layer, trace.experts].astype(trace.experts.dtype))
    assert count_traffic(moved, other, group_size) == count_traffic(trace, plan, group_size)


@settings(deadline=None, max_examples=50)
@given(cases(), st.integers(0, 2**32 - 1))
def test_the_numbers_of_ranks_in_a_node_do_not_matter(
    case: tuple[RoutingTrace, Plan, int], seed: int
) -> None:
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
