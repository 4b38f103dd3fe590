"""Prices of placements with replicas of experts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.solve.baselines import contiguous
from exflow.placement.solve.exact import brute_force
from exflow.placement.solve.objective import Objective, items_of
from exflow.profiling.trace import RoutingTrace
from tests.placement.problems import gpus, problem_of, trace_of

# Replicas


def test_items_are_the_experts_as_often_as_they_are_there() -> None:
    assert items_of(np.array([[1, 2, 0], [1, 1, 1]])).tolist() == [[0, 1, 1], [0, 1, 2]]


def test_replicas_wherever_the_tokens_come_from_save_the_crossings() -> None:
    """Expert 0 of layer 1 is on both parts, and all tokens go there: none has to leave its part."""
    trace = RoutingTrace.from_arrays(np.array([[0, 0], [1, 0], [2, 0]]), num_experts=3)
    once = problem_of(RoutingTrace.from_arrays(trace.experts[..., 0], num_experts=4), gpus(2))
    assert once.cost(contiguous(2, 4, 2)) == pytest.approx(1 / 3)
    problem = problem_of(trace, gpus(2), replicas=np.array([[1, 2, 1], [2, 1, 1]]))
    both = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])  # items 0 1 1 2 and 0 0 1 2
    assert problem.keeps_replicas_apart(both)
    assert problem.cost(both) == pytest.approx(0)


@given(seed=st.integers(0, 10**6), parts=st.sampled_from([2, 3]))
@settings(max_examples=40, deadline=None)
def test_a_token_crosses_where_no_replica_of_its_next_expert_is(seed: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    trace = RoutingTrace.from_arrays(rng.integers(0, 4, (15, 3)), num_experts=4)
    replicas = np.ones((3, 4), dtype=np.int64)
    for row in replicas:
        for _ in range(2):
            row[rng.choice(np.flatnonzero(row < parts))] += 1
    problem = problem_of(trace, gpus(parts), replicas=replicas)
    dealt = np.tile(np.arange(6) % parts, (3, 1))
    ranks = np.stack([rng.permutation(parts)[row] for row in dealt])
    assert problem.is_feasible(ranks)

    hosts = [
        [set(row[items == expert].tolist()) for expert in range(4)]
        for row, items in zip(ranks, items_of(replicas), strict=True)
    ]
    crossings = sum(
        np.mean([rank not in hosts[layer + 1][after] for rank in hosts[layer][before]])
        for token in trace.experts[..., 0]
        for layer, (before, after) in enumerate(pairwise(token.tolist()))
    )
    assert problem.cost(ranks) == pytest.approx(crossings / trace.num_tokens)


def test_the_load_is_shared_by_the_replicas() -> None:
    trace = RoutingTrace.from_arrays(np.array([[0]] * 8 + [[1]] * 3 + [[2]]), num_experts=3)
    problem = problem_of(trace, gpus(2), replicas=np.array([[2, 1, 1]]))
    assert problem.load.tolist() == [[4, 4, 3, 1]]
    assert problem.replica_ids.tolist() == [[0, 0, 1, 2]]


def test_nothing_costs_where_every_expert_is_everywhere() -> None:
    trace = trace_of(tokens=20, layers=3, top_k=1, seed=0, experts=3)
    problem = problem_of(trace, gpus(2), Objective(), replicas=np.full((3, 3), 2))
    everywhere = np.tile([0, 1] * 3, (3, 1))
    assert problem.is_feasible(everywhere)
    assert problem.cost(everywhere) == pytest.approx(0)


def test_more_replicas_than_ranks_idle() -> None:
    trace = RoutingTrace.from_arrays(np.array([[0, 0], [1, 1], [0, 1]]), num_experts=2)
    problem = problem_of(trace, gpus(2), replicas=np.array([[3, 1], [2, 2]]))
    assert problem.load.tolist() == [[1, 1, 0, 1], [0.5, 0.5, 1, 1]]
    assert len({*problem.replica_ids[0, :2]}) == 1
    assert problem.replica_ids[0, 2] not in problem.replica_ids[0, [0, 1, 3]]
    for idle_at in (0, 1):
        assert problem.keeps_replicas_apart(np.array([[0, 1, idle_at, 1 - idle_at], [0, 1, 0, 1]]))
    assert not problem.keeps_replicas_apart(np.array([[0, 0, 1, 1], [0, 1, 0, 1]]))


def test_an_expert_that_a_layer_lacks_is_no_item() -> None:
    trace = RoutingTrace.from_arrays(np.array([[0, 3], [1, 2]]), num_experts=4)
    problem = problem_of(trace, gpus(2), replicas=np.array([[2, 2, 0, 0], [1, 1, 1, 1]]))
    assert problem.shape == (2, 4, 2)
    assert problem.load.tolist() == [[0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1]]
    assert problem.cost(np.array([[0, 1, 0, 1], [0, 1, 0, 1]])) == pytest.approx(0.5)


def test_replicas_of_an_expert_that_all_go_to_lower_the_least_cost() -> None:
    ids = np.array([[0, 0], [1, 0], [2, 0], [3, 0]] * 3 + [[0, 1], [1, 2], [2, 3]])
    trace, costs = RoutingTrace.from_arrays(ids, num_experts=4), []
    for replicas in (
        [[1, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 1, 1, 3], [3, 1, 1, 1]],
        [[2, 2, 2, 2], [2, 2, 2, 2]],
    ):
        problem = problem_of(trace, gpus(2), replicas=np.array(replicas))
        costs.append(problem.cost(brute_force(problem)))
    assert np.allclose(costs, [6 / 15, 0, 0])
