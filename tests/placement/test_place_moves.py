"""Plans that may move few experts away from the plan in use."""

from dataclasses import replace

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.make_plan import BASELINES, InUse, Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.solve import anneal as search
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.trace import RoutingTrace
from tests.placement.planted import FOUR, TWO, TWO_NODES, check_valid, messages, planted


@pytest.fixture(autouse=True)
def two_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the search does for problems so small."""
    monkeypatch.setattr(search, "_MOST_TRIALS", 300_000)


def moves(plan: Plan, other: Plan) -> int:
    """Pairs (expert, rank) of `plan` that `other` lacks."""
    return int((plan.hosts & ~other.hosts).sum())


# Few moves.


@pytest.fixture(scope="module")
def drifted() -> tuple[RoutingTrace, Plan]:
    """A plan for yesterday's routing, and today's, in which each layer has four experts of other groups."""
    trace, _ = planted(noise=0.05)
    experts = np.array(trace.experts)
    experts[:, 1] = (experts[:, 1] + 1) % 16
    return replace(trace, experts=experts), place(trace, FOUR)


def test_no_moves_keep_the_plan(drifted: tuple[RoutingTrace, Plan]) -> None:
    trace, plan = drifted
    kept = place(trace, FOUR, in_use=InUse(plan, 0))
    assert np.array_equal(kept.physical_to_logical_map, plan.physical_to_logical_map)
    assert kept.trace_digest == trace.digest()
    assert kept.expected == evaluate(kept, trace)


def test_the_more_moves_the_fewer_messages(drifted: tuple[RoutingTrace, Plan]) -> None:
    trace, plan = drifted
    sent = []
    for max_moves in (0, 2, 6, 10**6):
        moved = place(trace, FOUR, in_use=InUse(plan, max_moves))
        assert moves(moved, plan) <= max_moves
        sent.append(messages(moved, trace))
    assert sent == sorted(sent, reverse=True)
    assert sent[1] < sent[0]
    anew = place(trace, FOUR)
    assert sent[-1] <= 1.05 * messages(anew, trace)


@pytest.mark.parametrize("method", ["search", "sweep", "ilp"])
@pytest.mark.parametrize("max_moves", [0, 1, 3])
def test_every_method_keeps_the_limit(
    drifted: tuple[RoutingTrace, Plan], method: str, max_moves: int
) -> None:
    trace, plan = drifted
    moved = place(trace, FOUR, in_use=InUse(plan, max_moves), solving=Solving(method, time_limit=1))
    check_valid(moved, trace, FOUR, 16)
    assert moves(moved, plan) <= max_moves


def test_replicas_in_use_stay_as_many_and_move_little(drifted: tuple[RoutingTrace, Plan]) -> None:
    trace, _ = drifted
    plan = place(planted(hot=0.8)[0], FOUR, redundant_experts=4)
    for max_moves in (0, 3):
        moved = place(trace, FOUR, in_use=InUse(plan, max_moves))
        assert moves(moved, plan) <= max_moves
        for row, before in zip(moved.physical_to_logical_map, plan.physical_to_logical_map, strict=True):
            assert np.array_equal(np.sort(row), np.sort(before))


@pytest.mark.parametrize("count", [1, 3])
def test_a_plan_whose_layers_differ_can_be_in_use(count: int) -> None:
    """An expert of the small layer has more replicas than there are ranks."""
    rng = np.random.default_rng(0)
    experts = np.stack([rng.integers(0, 16, 200), rng.integers(0, count, 200)], axis=1)
    trace = RoutingTrace.from_arrays(experts, num_experts=16, experts_per_layer=(16, count))
    plan = place(trace, FOUR)
    assert moves(place(trace, FOUR, in_use=InUse(plan, 2)), plan) <= 2


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_keeps_the_limit_or_refuses(drifted: tuple[RoutingTrace, Plan], method: str) -> None:
    trace, plan = drifted
    try:
        moved = place(trace, FOUR, in_use=InUse(plan, 1), solving=Solving(method))
    except InputError:
        return
    assert moves(moved, plan) <= 1


def test_what_a_plan_in_use_must_be(drifted: tuple[RoutingTrace, Plan]) -> None:
    trace, plan = drifted
    with pytest.raises(InputError, match=r"max moves is -1; choose a number from 0 up"):
        InUse(plan, -1)
    for topology in (TWO, TWO_NODES, Topology(num_nodes=4, gpus_per_node=1)):
        with pytest.raises(
            InputError, match=r"plan in use is for 4 ranks .*, not for .*; give the same GPUs"
        ):
            place(trace, topology, in_use=InUse(plan, 4))
    with pytest.raises(InputError, match="the plan is for 16 experts a layer, the trace has 8"):
        place(planted(experts=8)[0], FOUR, in_use=InUse(plan, 4))
    with pytest.raises(InputError, match="the plan is for 3 MoE layers, the trace has 2"):
        place(planted(layers=2)[0], FOUR, in_use=InUse(plan, 4))


def test_a_cap_that_needs_more_moves_is_refused() -> None:
    trace, _ = planted(hot=0.8, noise=0.4)
    plan = place(trace, FOUR, solving=Solving("random"))
    with pytest.raises(InputError, match=r"max moves 0: to keep the max imbalance \d+ experts have to move"):
        place(trace, FOUR, in_use=InUse(plan, 0), objective=Objective(max_imbalance=1.1))
