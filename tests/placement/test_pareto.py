import json

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.pareto import CAPS, trade_off
from exflow.placement.place import place
from exflow.placement.topology import Topology
from exflow.profiling.trace import RoutingTrace

TWO = Topology(gpus_per_node=2)


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """Expert 0 has nearly half of all tokens: on two ranks of two experts it takes more than its share."""
    rng = np.random.default_rng(0)
    experts = rng.choice(4, (500, 3, 1), p=[0.46, 0.24, 0.18, 0.12]).astype(np.uint8)
    experts[:, 1] = np.where(rng.random((500, 1)) < 0.8, experts[:, 0], experts[:, 1])
    return RoutingTrace.from_arrays(experts, num_experts=4)


def test_a_line_a_cap_the_loosest_last(trace: RoutingTrace) -> None:
    points = trade_off(trace, TWO, 1.3)
    assert [point.max_imbalance for point in points] == [1.02, 1.05, 1.1, 1.2, 1.3, 1.5, None]
    solved = [point.figures() for point in points if point.plan]
    objectives = [point.plan.objective for point in points if point.plan]
    assert objectives == sorted(objectives, reverse=True)  # exact: a looser cap never costs more
    for figures in solved[:-1]:
        assert figures["imbalance_mean"] <= figures["imbalance_max"] <= figures["max_imbalance"]


def test_caps_that_cannot_be_kept_say_so(trace: RoutingTrace) -> None:
    first = trade_off(trace, TWO)[0].figures()
    assert first["messages_per_token_layer"] is None
    assert first["reason"].startswith("max imbalance 1.02 cannot be kept: the least found for MoE layer")
    json.dumps(first)


def test_each_line_is_the_plan_of_its_own_solve(trace: RoutingTrace) -> None:
    for point in trade_off(trace, TWO):
        if point.plan is not None:
            alone = place(trace, TWO, max_imbalance=point.max_imbalance)
            assert np.array_equal(alone.rank_of_expert, point.plan.rank_of_expert)
            assert alone.expected == point.plan.expected


def test_a_listed_cap_is_not_solved_twice(trace: RoutingTrace) -> None:
    told: list[float | None] = []
    trade_off(trace, TWO, CAPS[2], progress=told.append)
    assert told == [*reversed(CAPS)][0:6]


@pytest.mark.parametrize("cap", [0.5, float("nan")])
def test_what_is_wrong_with_the_input_is_no_line(trace: RoutingTrace, cap: float) -> None:
    with pytest.raises(InputError, match="choose 1 or more"):
        trade_off(trace, TWO, cap)
    with pytest.raises(InputError, match="4 experts cannot be"):
        trade_off(trace, Topology(gpus_per_node=3))
