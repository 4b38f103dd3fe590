"""The report's count by layer and by pair is placement's, kept apart; its sums are the same integers."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.evaluate import evaluate
from exflow.placement.traffic.traffic import follow, total
from exflow.profiling.trace import RoutingTrace
from exflow.report.counts import blocks_of, count


def make_plan(slots: npt.ArrayLike, topology: Topology, trace: RoutingTrace) -> Plan:
    return Plan.of_slots(np.asarray(slots), topology, trace, method="test")


@st.composite
def cases(draw: st.DrawFn) -> tuple[RoutingTrace, Plan, int]:
    """A trace, a plan with replicas on several nodes, a group size."""
    topology = Topology(num_nodes=draw(st.integers(1, 3)), gpus_per_node=draw(st.integers(1, 3)))
    ranks = topology.num_ranks
    slots = ranks * draw(st.integers(1, 3))
    experts, layers, top_k = draw(st.integers(1, slots)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = draw(st.integers(1, 20))
    trace = RoutingTrace.from_arrays(
        rng.integers(0, experts, (tokens, layers, top_k)),
        num_experts=experts,
        sequence=rng.integers(0, 2 * ranks, tokens),
    )
    placed = [
        rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)]))
        for _ in range(layers)
    ]
    group_size = draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
    return trace, make_plan(placed, topology, trace), group_size


@settings(max_examples=150, deadline=None)
@given(cases())
def test_sums_are_placements_totals(case: tuple[RoutingTrace, Plan, int]) -> None:
    trace, plan, group_size = case
    counts, followed = count(trace, plan, group_size), follow(trace, plan, group_size)
    traffic = total(followed, plan, group_size)
    assert counts.totals == {
        "messages": traffic.messages,
        "dispatch_intra": traffic.dispatch_intra,
        "dispatch_inter": traffic.dispatch_inter,
        "return_intra": traffic.return_intra,
        "return_inter": traffic.return_inter,
    }
    assert counts.by_layer.sum() == counts.by_pair.sum()
    node = plan.topology.node_of_rank
    assert counts.by_pair[node[:, None] != node].sum() == traffic.inter_node
    assert not counts.by_pair.diagonal().any()
    np.testing.assert_array_equal(counts.load, followed.load.sum(axis=0))

    block = blocks_of(plan.topology)
    owned = np.stack([np.bincount(block, each, block.max() + 1) for each in followed.owned])
    np.testing.assert_array_equal(counts.moves.sum(axis=2), owned[:-1])
    np.testing.assert_array_equal(counts.moves.sum(axis=1), owned[1:])


@settings(max_examples=30, deadline=None)
@given(cases())
def test_sums_are_what_evaluate_prints(case: tuple[RoutingTrace, Plan, int]) -> None:
    trace, plan, _ = case
    strategies = evaluate(plan, trace)["strategies"]
    sizes = {"dispatch_combine": 1, "coherent": plan.num_ranks}
    for name, size in sizes.items():
        totals = count(trace, plan, size).totals
        assert totals == {key: strategies[name]["totals"][key] for key in totals}


def test_a_token_that_leaves_and_stays() -> None:
    """Expert 2 of the first layer and 3 of the second are on rank 1, the sequence is at home on rank 0."""
    trace = RoutingTrace.from_arrays([[[2], [3]]], num_experts=4)
    plan = make_plan([[0, 1, 2, 3]] * 2, Topology(gpus_per_node=2), trace)
    coherent = count(trace, plan, 2)
    assert coherent.by_layer.tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert coherent.by_pair.tolist() == [[0, 1], [0, 0]]
    assert coherent.load.tolist() == [[0, 1], [0, 1]]
    assert coherent.moves.tolist() == [[[0, 1], [0, 0]], [[0, 0], [0, 1]]]
    home = count(trace, plan, 1)
    assert home.by_layer.tolist() == [[[1, 0], [1, 0]], [[1, 0], [1, 0]]]
    assert home.by_pair.tolist() == [[0, 2], [2, 0]]


@pytest.mark.parametrize(
    ("nodes", "gpus", "sizes"),
    [
        (1, 8, [1] * 8),
        (2, 8, [2] * 8),
        (4, 8, [4] * 8),
        (1, 12, [2] * 6),
        (11, 2, [4] * 5 + [2]),
        (1, 1, [1]),
    ],
)
def test_blocks_are_few_and_never_part_of_two_nodes(nodes: int, gpus: int, sizes: list[int]) -> None:
    assert np.bincount(blocks_of(Topology(num_nodes=nodes, gpus_per_node=gpus))).tolist() == sizes
