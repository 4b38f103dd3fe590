"""The search for replicas, against all plans of a small layer; and what plans are made of it."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.fastest_plan import place_for_time
from exflow.placement.plan.replicas import serving_slots
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.replica_search import Replicas, Start, search_for_replicas
from exflow.placement.solve.replica_swaps import Rule, state_of
from exflow.placement.solve.time_swaps import cost_us
from exflow.placement.solve.time_weights import weights_of
from exflow.placement.time.machines import machine_named
from exflow.placement.time.serving import Serving
from exflow.placement.time.sizes import sizes_of
from exflow.placement.traffic.step_time import step_time
from exflow.profiling.trace import RoutingTrace
from tests.placement.test_time_search import themed_trace

TARGETS = ("exflow", "sglang", "vllm", "vllm-ascend")


def serving(target: str, machine: str = "single-gpu-nodes", batch: int = 256) -> Serving:
    return Serving(target, machine=machine_named(machine), sizes=sizes_of("gpt-oss-20b"), batch=batch)


def cost_of(
    trace: RoutingTrace, slots: np.ndarray, table: np.ndarray | None, topology: Topology, who: Serving
) -> float:
    """The smooth cost of layer 0 with the experts `slots` [P], and `table` [E, G] or the rule's."""
    chosen, ranks = np.ascontiguousarray(trace.experts[:, 0]), topology.num_ranks
    served = serving_slots(slots[None], trace.num_experts, topology, who.rule)[:, :, 0]  # [W, G, E]
    if table is None:
        table = (served // (len(slots) // ranks)).transpose(2, 1, 0).reshape(trace.num_experts, -1)
    classes = table.shape[1]
    weights = weights_of(chosen, trace.num_experts, topology, who)
    state = state_of(
        chosen,
        slots.reshape(ranks, -1),
        np.ascontiguousarray(table),
        Rule(False, True, classes // ranks, topology.gpus_per_node),
        np.stack([weights.work(part) for part in np.arange(classes + 1) / classes], axis=1),
    )
    assert state.served.sum() == table.size
    prices = weights.prices_by_link()
    return cost_us(state.received, state.received_far, state.load, prices, weights.tokens / len(chosen))


def one_layer(seed: int, experts: int) -> RoutingTrace:
    two = themed_trace(seed, experts, tokens=120)
    return RoutingTrace.from_arrays(
        two.experts[:, :1], num_experts=experts, sequence=two.sequence, model="toy"
    )


def searched(trace: RoutingTrace, topology: Topology, who: Serving, slots: int, seed: int) -> Replicas:
    start = Start(np.resize(np.arange(trace.num_experts), slots)[None])
    return search_for_replicas(trace, topology, who, [start], seed=seed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("nodes", [1, 3])
def test_no_plan_of_a_small_layer_is_better(target: str, nodes: int) -> None:
    """4 experts and 2 replicas on 3 ranks; by the table of our own at least as good as by the best rule."""
    topology, who = Topology(num_nodes=nodes, gpus_per_node=3 // nodes), serving(target)
    pairs = [(e, f) for e in range(4) for f in range(e)]
    plans = [np.concatenate(each) for each in np.array(list(permutations(pairs, 3)))]
    whole = [plan for plan in plans if len(set(plan.tolist())) == 4]
    for seed in range(2):
        trace = one_layer(seed, 4)
        found = searched(trace, topology, who, 6, seed)
        table = None if found.serving_rank is None else found.serving_rank[0]
        best = min(cost_of(trace, plan, None, topology, who) for plan in whole)
        assert cost_of(trace, found.slots[0], table, topology, who) <= best + 1e-6


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), nodes=st.sampled_from([1, 2, 4]), target=st.sampled_from(TARGETS))
def test_counts_are_kept_up_to_date(seed: int, nodes: int, target: str) -> None:
    """A search that lost count of what moved would end above its start."""
    topology, who = Topology(num_nodes=nodes, gpus_per_node=4 // nodes), serving(target)
    trace = one_layer(seed, 8)
    found = searched(trace, topology, who, 12, seed)
    assert set(found.slots[0]) == set(range(8))
    by_rank = found.slots[0].reshape(4, 3)
    assert all(len(set(row)) == 3 for row in by_rank.tolist())
    table = None
    if found.serving_rank is not None:
        table = found.serving_rank[0]
        for (expert, _), rank in np.ndenumerate(table):
            assert expert in by_rank[rank]
    start = np.resize(np.arange(8), 12)
    assert (
        cost_of(trace, found.slots[0], table, topology, who)
        <= cost_of(trace, start, None, topology, who) + 1e-6
    )


@pytest.mark.parametrize("machine", ["h200", "single-gpu-nodes"])
def test_replicas_never_make_our_own_steps_slower(machine: str) -> None:
    trace, topology, who = themed_trace(3, 8), Topology(gpus_per_node=4), serving("exflow", machine)
    plain, spare = (
        place_for_time(trace, topology, who, redundant_experts=each, time_limit=5) for each in (0, 4)
    )
    assert step_time(spare, trace, who).step_us <= step_time(plain, trace, who).step_us
    assert spare.num_slots == 12


def test_layers_with_different_numbers_of_experts() -> None:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.integers(0, count, 300) for count in (8, 3, 6)], axis=1)
    trace = RoutingTrace.from_arrays(experts, num_experts=8, experts_per_layer=(8, 3, 6), model="toy")
    for target in TARGETS:
        plan = place_for_time(trace, Topology(gpus_per_node=4), serving(target), time_limit=5)
        assert plan.num_slots == 8
        plan.check_trace(trace)
