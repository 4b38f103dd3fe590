import json
import math
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.make_plan import Solving, place
from exflow.placement.pareto import PRICES, Point, trade_off
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.profiling.trace import RoutingTrace

TWO = Topology(gpus_per_node=2)


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """Expert 0 has nearly half of all tokens: on two ranks of two experts it takes more than its share."""
    rng = np.random.default_rng(0)
    experts = rng.choice(4, (500, 3, 1), p=[0.46, 0.24, 0.18, 0.12]).astype(np.uint8)
    experts[:, 1] = np.where(rng.random((500, 1)) < 0.8, experts[:, 0], experts[:, 1])
    return RoutingTrace.from_arrays(experts, num_experts=4)


def points_of(trace: RoutingTrace, objective: Objective | None = None, **more: Any) -> list[Point]:
    return trade_off([trace], TWO, objective=objective or Objective(), solving=Solving(), **more)


def test_a_point_a_price_the_dearest_last(trace: RoutingTrace) -> None:
    points = points_of(trace, Objective(balance_price=0.45))
    assert [point.balance_price for point in points] == [0.0, 0.3, 0.45, 0.6, 1.2, 2.5, 5.0, 10.0]
    figures = [point.figures() for point in points]
    assert json.loads(json.dumps(figures)) == figures
    assert all(each["imbalance_mean"] <= each["imbalance_max"] for each in figures)
    # Exact: a higher price never buys less balance, nor for fewer messages.
    balance = [each["imbalance_mean"] for each in figures]
    assert (np.diff(balance) <= 1e-9).all()
    assert balance[-1] < balance[0]
    objectives = [point.plan.objective for point in points]
    assert objectives == sorted(objectives)


def test_figures_are_those_of_the_strategy(trace: RoutingTrace) -> None:
    for strategy in ("coherent", "dispatch-combine"):
        point = points_of(trace, Objective(strategy=strategy))[0]
        expected = point.plan.expected["strategies"][strategy.replace("-", "_")]
        assert point.figures() == {
            "balance_price": 0.0,
            "messages_per_token_layer": expected["messages_per_token_layer"],
            "imbalance_mean": point.plan.expected["imbalance"]["mean"],
            "imbalance_max": point.plan.expected["imbalance"]["max"],
        }


def test_each_point_is_the_plan_of_its_own_solve(trace: RoutingTrace) -> None:
    for point in points_of(trace, Objective(max_imbalance=1.5)):
        alone = place(trace, TWO, objective=Objective(balance_price=point.balance_price, max_imbalance=1.5))
        assert np.array_equal(alone.rank_of_expert, point.plan.rank_of_expert)
        assert alone.expected == point.plan.expected
        assert alone.expected["imbalance"]["max"] <= 1.5


def test_a_listed_price_is_not_solved_twice(trace: RoutingTrace) -> None:
    told: list[float] = []
    points = points_of(trace, Objective(balance_price=PRICES[2]), tell=told.append)
    assert told == [point.balance_price for point in points] == list(PRICES)


def test_replicas_and_several_traces_are_taken(trace: RoutingTrace) -> None:
    traces = [trace.select(np.arange(500) < 200), trace.select(np.arange(500) >= 200)]
    solving = Solving("sweep", time_limit=7.0)
    points = trade_off(traces, TWO, objective=Objective(), solving=solving, redundant_experts=1)
    assert {point.plan.num_slots for point in points} == {6}
    assert {point.plan.expected["tokens"] for point in points} == {500}


def test_time_is_shared_out(trace: RoutingTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    from exflow.placement import pareto

    given: list[float] = []

    def placed(*args: Any, solving: Solving, **more: Any) -> Any:
        given.append(solving.time_limit)
        return place(*args, solving=Solving("contiguous"), **more)

    monkeypatch.setattr(pareto, "place", placed)
    trade_off([trace], TWO, objective=Objective(), solving=Solving(time_limit=14.0))
    assert given == [2.0] * 7
    given.clear()
    trade_off([trace], TWO, objective=Objective(), solving=Solving())
    assert given == [math.inf] * 7


def test_what_is_wrong_with_the_input_is_no_point(trace: RoutingTrace) -> None:
    with pytest.raises(InputError, match="max imbalance 1 cannot be kept: the least found for MoE layer"):
        points_of(trace, Objective(max_imbalance=1))
    with pytest.raises(InputError, match="trace holds no tokens"):
        points_of(trace.select(np.zeros(500, dtype=bool)))
