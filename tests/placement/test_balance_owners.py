"""Owners spread over the ranks: what it may change, and that it does what it is for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.balance_owners import balance_owners
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.trace import RoutingTrace


def popular(tokens: int = 400, seed: int = 0) -> RoutingTrace:
    """Half of all tokens select expert 0 in every layer, and any other beside it."""
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permuted(np.arange(8), axis=0)[:2] for _ in range(tokens * 3)]).reshape(-1, 3, 2)
    chosen = (rng.random((tokens, 3)) < 0.5) & (experts != 0).all(axis=2)
    experts[..., 0][chosen] = 0
    return RoutingTrace.from_arrays(experts, num_experts=8, sequence=np.arange(tokens) // 20)


def cost(plan: Plan, trace: RoutingTrace, price: float) -> float:
    figures = evaluate(plan, trace)["strategies"][plan.strategy.replace("-", "_")]
    owners = figures["owner_imbalance"]["per_layer"][1:]  # where a sequence begins is no choice
    return float(figures["messages_per_token_layer"] + price * np.mean(owners))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.sampled_from([0.05, 0.3, 2.0]), st.sampled_from([2, 4]))
def test_it_never_costs_more_and_changes_the_table_alone(seed: int, price: float, ranks: int) -> None:
    trace = popular(100, seed)
    plan = place(trace, Topology(gpus_per_node=ranks), solving=Solving("sweep"))
    level = balance_owners(plan, trace, price)
    assert cost(level, trace, price) <= cost(plan, trace, price) + 1e-9
    assert level.next_owner is not None and plan.next_owner is not None
    same = replace(level, next_owner=plan.next_owner)
    assert np.array_equal(same.physical_to_logical_map, plan.physical_to_logical_map)
    assert (same.method, same.topology, same.strategy) == (plan.method, plan.topology, plan.strategy)


def test_a_popular_expert_no_longer_draws_all_tokens_to_its_rank() -> None:
    train, test = popular(), popular(seed=1)
    topology = Topology(gpus_per_node=2)
    plain, level = (
        place(train, topology, objective=Objective(owner_price=price), solving=Solving("contiguous"))
        for price in (0, 1.0)
    )
    before, after = (
        evaluate(plan, test)["strategies"]["coherent"]["owner_imbalance"]["mean"] for plan in (plain, level)
    )
    assert before > 1.3
    assert after < 1.15
    # what the plan expects is what its own table does
    assert level.expected["strategies"] == evaluate(level, train)["strategies"]


def test_a_token_that_always_comes_home_leaves_no_choice() -> None:
    trace = popular(60)
    objective = Objective("dispatch-combine")
    plan = place(trace, Topology(gpus_per_node=2), objective=objective, solving=Solving("contiguous"))
    assert balance_owners(plan, trace, 1.0) is plan


def test_a_price_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"owner price is -1; choose a number from 0 up"):
        Objective(owner_price=-1)
