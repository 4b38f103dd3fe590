"""The time of a step: the one function, against a count by sets, by hand, and by laws."""

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machine import Link, Machine
from exflow.placement.time.machines import NamedMachine
from exflow.placement.time.serving import Serving
from exflow.placement.time.sizes import ModelSizes
from exflow.placement.traffic.step_time import count_batches, drawn_batches, least_step_us, step_time
from exflow.placement.traffic.traffic import owners
from exflow.profiling.trace import RoutingTrace

SIZES = ModelSizes("toy", hidden_size=500, expert_weights=5000, kv_width=10)  # 1,000 bytes a row
MACHINE = Machine(
    inside=Link(latency_s=2e-6, bytes_per_s=1e9),
    between=Link(latency_s=5e-6, bytes_per_s=1e8, peer_s=1e-6),
    read_bytes_per_s=1e10,
    memory_bytes=1e9,
    flops_per_s=1e10,
)


def serving(
    strategy: Strategy = Strategy.DISPATCH_COMBINE, batch: int = 3, target: str = "exflow"
) -> Serving:
    return Serving(target, strategy, NamedMachine("toy", MACHINE), SIZES, batch, context=7)


def random_trace(
    rng: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int
) -> RoutingTrace:
    chosen = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]
    return RoutingTrace.from_arrays(chosen, num_experts=experts, sequence=np.arange(tokens) // 4, model="toy")


def random_case(
    seed: int, nodes: tuple[int, int], top_k: int, redundant: int, strategy: Strategy
) -> tuple[RoutingTrace, Plan]:
    """Two layers of 8 experts; a plan with `redundant` replicas, for nodes[0] nodes of nodes[1] ranks."""
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, 24, 2, 8, top_k)
    topology = Topology(num_nodes=nodes[0], gpus_per_node=nodes[1])
    spare = rng.integers(0, 8, (2, redundant))
    slots = rng.permuted(np.concatenate([np.tile(np.arange(8), (2, 1)), spare], axis=1), axis=1)
    plan = Plan.of_slots(slots, topology, trace, method="random", strategy=strategy)
    return trace, plan


def by_sets(plan: Plan, trace: RoutingTrace, who: Serving, rows_NM: npt.NDArray[np.int64]) -> list[float]:
    """The same figures, token by token with sets: exchange, experts, attention in microseconds."""
    ranks, per_node = plan.num_ranks, plan.topology.gpus_per_node
    group = who.strategy.group_size(ranks, per_node)
    owner = owners(trace, plan, group)
    machine, totals, served = who.machine.machine, np.zeros(3), plan.serving_slots(who.rule)
    for rows in rows_NM:
        for layer in range(plan.num_layers):
            near, far = np.zeros((2, 2, ranks)), np.zeros((2, 2, ranks))  # phase, in or out
            touched: list[set[int]] = [set() for _ in range(ranks)]
            pairs, held = np.zeros(ranks), np.zeros(ranks)
            for i, token in enumerate(rows):
                ends = (i % ranks,) * 2 if group == 1 else tuple(owner[token, layer : layer + 2])
                held[ends[0]] += 1
                places = range(i // ranks * trace.top_k, (i // ranks + 1) * trace.top_k)
                slots = [
                    int(served[place % len(served), ends[0], layer, e])
                    for place, e in zip(places, trace.experts[token, layer], strict=True)
                ]
                for slot in slots:
                    pairs[slot // plan.slots_per_rank] += 1
                    touched[slot // plan.slots_per_rank].add(slot)
                hosts = {slot // plan.slots_per_rank for slot in slots}
                for phase, end in enumerate(ends):
                    for host in hosts - {end}:
                        if host // per_node == end // per_node:
                            near[phase, 0, host] += 1
                            near[phase, 1, end] += 1
                    for node in {host // per_node for host in hosts} - {end // per_node}:
                        relay = node * per_node + end % per_node
                        far[phase, 0, relay] += 1
                        far[phase, 1, end] += 1
                        for host in hosts - {relay}:
                            if host // per_node == node:
                                near[phase, 0, host] += 1
                                near[phase, 1, relay] += 1
            phases = 1 if group > 1 and trace.top_k == 1 else 2
            nodes = ranks // per_node
            empty = 5e-6 + 1e-6 * (ranks - per_node) if nodes > 1 else 2e-6 * (ranks > 1)
            for phase in range(phases):
                totals[0] += empty + max(
                    near[phase].max() * SIZES.row_bytes / machine.inside.bytes_per_s,
                    far[phase].max() * SIZES.row_bytes / machine.between.bytes_per_s,
                )
            totals[1] += max(
                len(touched[rank]) * SIZES.expert_bytes / 1e10 + pairs[rank] * SIZES.operations / 1e10
                for rank in range(ranks)
            )
            totals[2] += held.max() * 7 * SIZES.kv_bytes / 1e10 if group > 1 else 0
    return list(1e6 * totals / len(rows_NM))


@given(
    seed=st.integers(0, 10**6),
    nodes=st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 2), (4, 1), (2, 1)]),
    top_k=st.integers(1, 3),
    redundant=st.sampled_from([0, 4]),
    setting=st.sampled_from(
        [
            (Strategy.DISPATCH_COMBINE, "sglang"),
            (Strategy.DISPATCH_COMBINE, "vllm"),
            (Strategy.DISPATCH_COMBINE, "vllm-ascend"),
            (Strategy.COHERENT, "exflow"),
            (Strategy.NODE_COHERENT, "exflow"),
        ]
    ),
)
def test_against_a_count_by_sets(
    seed: int, nodes: tuple[int, int], top_k: int, redundant: int, setting: tuple[Strategy, str]
) -> None:
    strategy, target = setting
    trace, plan = random_case(seed, nodes, top_k, redundant, strategy)
    who = serving(strategy, target=target)
    found = step_time(plan, trace, who, seed)
    right = by_sets(plan, trace, who, drawn_batches(trace, 3 * plan.num_ranks, seed))
    assert [found.exchange_us, found.experts_us, found.attention_us] == pytest.approx(right)
    assert found.step_us == pytest.approx(sum(right))


def test_by_hand() -> None:
    """Every token chooses expert 0, on rank 0 of two: the tokens of rank 1 cross, and come back."""
    trace = RoutingTrace.from_arrays(np.zeros((8, 1, 1), dtype=np.int64), num_experts=2, model="toy")
    plan = Plan.from_ranks(np.array([[0, 1]]), Topology(gpus_per_node=2), trace, method="by hand")
    found = step_time(plan, trace, serving(batch=4))
    assert found.exchange_us == pytest.approx(2 * (2 + 4))  # latency, and 4 rows of 1,000 bytes at 1 GB/s
    assert found.experts_us == pytest.approx(1 + 8)  # 10,000 bytes, and 8 pairs of 10,000 operations
    assert (found.busiest_link_rows, found.compute_imbalance) == (2.0, 2.0)
    assert found.messages == 1.0  # half of the tokens, there and back


@given(seed=st.integers(0, 10**6))
def test_names_of_experts_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, 40, 2, 8, 2)
    ranks = rng.permuted(np.tile(np.arange(8) % 4, (2, 1)), axis=1)
    renamed = rng.permuted(np.tile(np.arange(8), (2, 1)), axis=1)  # new name of each expert
    new_ranks = np.empty_like(ranks)
    np.put_along_axis(new_ranks, renamed, ranks, axis=1)
    new_experts = np.stack([renamed[layer][trace.experts[:, layer]] for layer in range(2)], axis=1)
    other = RoutingTrace.from_arrays(new_experts, num_experts=8, sequence=trace.sequence, model="toy")
    topology = Topology(gpus_per_node=4)
    one = step_time(Plan.from_ranks(ranks, topology, trace, method="a"), trace, serving())
    two = step_time(Plan.from_ranks(new_ranks, topology, other, method="a"), other, serving())
    assert one == two


@given(seed=st.integers(0, 10**6), nodes=st.sampled_from([(1, 4), (2, 2), (4, 1)]))
def test_names_of_ranks_do_not_matter(seed: int, nodes: tuple[int, int]) -> None:
    """Nodes and the ranks in each get other numbers, in the plan and as homes of the tokens."""
    rng, (num_nodes, per_node) = np.random.default_rng(seed), nodes
    trace, plan = random_case(seed, nodes, 3, 4, Strategy.DISPATCH_COMBINE)
    place = rng.permutation(per_node)
    new = (rng.permutation(num_nodes)[:, None] * per_node + place).ravel()  # new number of each rank
    slots = np.empty_like(plan.physical_to_logical_map.reshape(2, 4, -1))
    slots[:, new] = plan.physical_to_logical_map.reshape(2, 4, -1)
    by_rule = plan.serving_slot // plan.slots_per_rank
    served = np.empty_like(by_rule)
    served[new] = new[by_rule]
    one = dataclasses.replace(plan, serving_rank=by_rule.transpose(1, 2, 0))
    other = dataclasses.replace(
        plan,
        physical_to_logical_map=slots.reshape(2, -1),
        next_owner=None,
        serving_rank=served.transpose(1, 2, 0),
    )
    rows = drawn_batches(trace, 12, seed)
    renamed = np.empty_like(rows)
    at = np.arange(12)
    renamed[:, at // 4 * 4 + new[at % 4]] = rows
    before, after = (
        count_batches(one, trace, serving(), rows),
        count_batches(other, trace, serving(), renamed),
    )
    for name in ("near", "far", "busiest", "messages"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    for name in ("pairs", "touched"):
        assert np.array_equal(getattr(before, name), getattr(after, name)[..., new]), name


def test_a_trace_without_tokens() -> None:
    trace = random_trace(np.random.default_rng(0), 8, 1, 4, 2)
    plan = Plan.from_ranks(np.array([[0, 0, 1, 1]]), Topology(gpus_per_node=2), trace, method="a")
    with pytest.raises(InputError, match="the trace has no tokens to judge the plan by"):
        step_time(plan, trace.select(trace.sequence < 0), serving())


def test_a_batch_without_tokens() -> None:
    with pytest.raises(InputError, match="batch is 0"):
        serving(batch=0)


@given(
    seed=st.integers(0, 10**6),
    nodes=st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 2), (4, 1)]),
    top_k=st.integers(1, 4),
    redundant=st.sampled_from([0, 4]),
    strategy=st.sampled_from([Strategy.DISPATCH_COMBINE, Strategy.COHERENT, Strategy.NODE_COHERENT]),
)
def test_no_plan_is_below_the_bound(
    seed: int, nodes: tuple[int, int], top_k: int, redundant: int, strategy: Strategy
) -> None:
    trace, plan = random_case(seed, nodes, top_k, redundant, strategy)
    who = serving(strategy)
    least = least_step_us(plan, trace, who, seed)
    assert 0 < least <= step_time(plan, trace, who, seed).step_us * (1 + 1e-9)


def test_the_bound_is_reached_by_hand() -> None:
    """One GPU has everything to do, whatever the plan."""
    trace = RoutingTrace.from_arrays(np.zeros((8, 1, 1), dtype=np.int64), num_experts=2, model="toy")
    plan = Plan.from_ranks(np.array([[0, 1]]), Topology(gpus_per_node=2), trace, method="by hand")
    who = serving(batch=4)
    assert least_step_us(plan, trace, who) == pytest.approx(step_time(plan, trace, who).step_us)


def test_slower_links_of_a_class_count_as_many_times_as_they_are_slower() -> None:
    """Every token chooses expert 0, on rank 0 of two; between three ranks one pair is 3 times as dear."""
    trace = RoutingTrace.from_arrays(np.zeros((9, 1, 1), dtype=np.int64), num_experts=3, model="toy")
    cost = ((0.0, 2.0, 6.0), (2.0, 0.0, 2.0), (6.0, 2.0, 0.0))
    plan = Plan.from_ranks(
        np.array([[0, 1, 2]]), Topology(gpus_per_node=3, link_cost=cost), trace, method="by hand"
    )
    found = step_time(plan, trace, serving(batch=4))
    assert found.exchange_us == pytest.approx(2 * (2 + 4 + 3 * 4))  # rank 0 receives 4 rows from each
    assert found.busiest_link_rows == 2 * 8 / 4
