"""The search for time, against all assignments of a small layer; and what plans are made of it."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.fastest_plan import compared, place_for_time, references
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.time_search import search_for_time
from exflow.placement.solve.time_swaps import cost_us, counts_of
from exflow.placement.solve.time_weights import weights_of
from exflow.placement.time.machines import machine_named
from exflow.placement.time.serving import Serving
from exflow.placement.time.sizes import sizes_of
from exflow.placement.traffic.step_time import step_time
from exflow.profiling.trace import RoutingTrace

SERVINGS = {
    name: Serving("sglang", machine=machine_named(name), sizes=sizes_of("gpt-oss-20b"), batch=16)
    for name in ("h200", "single-gpu-nodes")
}


def themed_trace(seed: int, experts: int, tokens: int = 400, top_k: int = 2) -> RoutingTrace:
    """Each token keeps to one of two halves of the experts, mostly; some experts are hot."""
    rng = np.random.default_rng(seed)
    half = rng.permuted(np.tile(np.arange(experts), (2, 1)), axis=1)
    heat = rng.gamma(1.0, size=(2, experts)) + 0.1
    chosen = np.empty((tokens, 2, top_k), dtype=np.int64)
    for token in range(tokens):
        side = rng.integers(2)
        for layer in range(2):
            mine = half[layer].reshape(2, -1)[side]
            share = heat[layer].copy()
            share[mine] *= 8
            chosen[token, layer] = rng.choice(experts, top_k, replace=False, p=share / share.sum())
    sequence = np.arange(tokens) // 10
    return RoutingTrace.from_arrays(chosen, num_experts=experts, sequence=sequence, model="toy")


def smooth_cost(
    trace: RoutingTrace, layer: int, row: np.ndarray, topology: Topology, serving: Serving
) -> float:
    chosen = np.ascontiguousarray(trace.experts[:, layer])
    weights = weights_of(chosen, trace.num_experts, topology, serving)
    state = counts_of(chosen, row, topology.num_ranks, topology.gpus_per_node, weights.work())
    prices = weights.prices()
    return cost_us(*state[2:], prices, weights.tokens / len(chosen))


@pytest.mark.parametrize("machine", SERVINGS)
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_no_assignment_of_a_small_layer_is_better(machine: str, nodes: int) -> None:
    experts, ranks = 6, 3
    if ranks % nodes:
        ranks = 2
    serving, topology = SERVINGS[machine], Topology(num_nodes=nodes, gpus_per_node=ranks // nodes)
    everything = np.unique(list(permutations(np.repeat(np.arange(ranks), experts // ranks))), axis=0)
    for seed in range(3):
        trace = themed_trace(seed, experts)
        start = np.tile(everything[0], (2, 1))
        found = search_for_time(trace, topology, serving, [start], seed=seed)
        for layer in range(2):
            best = min(smooth_cost(trace, layer, row, topology, serving) for row in everything)
            assert smooth_cost(trace, layer, found[layer], topology, serving) <= best + 1e-6


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), nodes=st.sampled_from([1, 2, 4]), machine=st.sampled_from(list(SERVINGS)))
def test_counts_are_kept_up_to_date(seed: int, nodes: int, machine: str) -> None:
    """The cost that a search ends with is that of its assignment, so it is never above that of its start."""
    topology, serving = Topology(num_nodes=nodes, gpus_per_node=4 // nodes), SERVINGS[machine]
    trace = themed_trace(seed, 8, tokens=120, top_k=3)
    starts = [
        np.random.default_rng([seed, i]).permuted(np.tile(np.arange(8) % 4, (2, 1)), axis=1) for i in (0, 1)
    ]
    found = search_for_time(trace, topology, serving, starts, seed=seed)
    for layer in range(2):
        assert np.bincount(found[layer]).tolist() == [2] * 4
        least = min(smooth_cost(trace, layer, start[layer], topology, serving) for start in starts)
        assert smooth_cost(trace, layer, found[layer], topology, serving) <= least + 1e-6


@pytest.mark.parametrize("strategy", [Strategy.DISPATCH_COMBINE, Strategy.COHERENT])
@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("machine", SERVINGS)
def test_a_plan_is_never_slower_than_what_it_is_compared_with(
    strategy: Strategy, redundant: int, machine: str
) -> None:
    trace, topology = themed_trace(5, 8), Topology(num_nodes=2, gpus_per_node=2)
    serving = Serving("exflow", strategy, machine_named(machine), sizes_of("gpt-oss-20b"))
    plan = place_for_time(trace, topology, serving, redundant_experts=redundant, time_limit=5)
    others = references(trace, topology, strategy, plan.num_slots)
    figures = dict(plan.expected["time"])
    assert ("without_replicas_us" in figures) == bool(redundant)
    without = figures.pop("without_replicas_us", figures["step_us"])
    if strategy == Strategy.DISPATCH_COMBINE:  # coherent: owners follow idle replicas too
        assert figures["step_us"] <= without
    assert plan.strategy == strategy
    assert figures == compared(plan, others, trace, serving)
    assert figures["step_us"] == step_time(plan, trace, serving).step_us
    for name, other in others.items():
        assert figures["references"][name]["step_us"] == step_time(other, trace, serving).step_us
        assert figures["step_us"] <= figures["references"][name]["step_us"]
    assert plan.expected["made_for"]["machine"] == machine


def test_the_same_seed_gives_the_same_plan() -> None:
    trace, topology = themed_trace(6, 8), Topology(gpus_per_node=4)
    one, two = (place_for_time(trace, topology, SERVINGS["h200"], seed=3) for _ in range(2))
    assert np.array_equal(one.physical_to_logical_map, two.physical_to_logical_map)


def test_experts_that_ranks_cannot_share_equally() -> None:
    trace, topology = themed_trace(7, 6), Topology(gpus_per_node=4)
    plan = place_for_time(trace, topology, SERVINGS["h200"], time_limit=5)
    assert plan.num_slots == 8
    assert isinstance(plan, Plan)


def test_ctrl_c_gives_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, topology = themed_trace(8, 8), Topology(gpus_per_node=4)
    start = np.tile(np.arange(8) // 2, (2, 1))

    def interrupt(what: str) -> None:
        raise KeyboardInterrupt

    found = search_for_time(trace, topology, SERVINGS["h200"], [start], tell=interrupt)
    assert np.bincount(found[0]).tolist() == np.bincount(found[1]).tolist() == [2] * 4
