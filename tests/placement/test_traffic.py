"""Counted traffic of small plans, followed by hand; laws are in test_traffic_laws.py."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import (
    Traffic,
    count_traffic,
    follow,
    imbalance,
    local_fraction,
    rank_load,
)
from exflow.profiling.trace import RoutingTrace
from tests.placement.drawn_plans import make_plan, plan_of_slots

TWO_RANKS = make_plan(np.array([[0, 0, 1, 1]] * 2), Topology(gpus_per_node=2))
# expert 2 of the first layer is on rank 1 alone; expert 0 of the second is on both ranks
MOVING = plan_of_slots([[0, 1, 1, 2], [0, 1, 0, 2]], Topology(gpus_per_node=2))


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


def test_the_nearest_replica_serves() -> None:
    """Expert 0 is on ranks 0 and 3, one on each node; expert 1 on rank 1, expert 2 on rank 2."""
    plan = plan_of_slots([[0, 1, 2, 0]], Topology(num_nodes=2, gpus_per_node=2))
    for sequence, ranks in ((0, [0, 1, 2]), (1, [0, 1, 2]), (2, [3, 1, 2]), (3, [3, 1, 2])):
        trace = RoutingTrace.from_arrays([[0], [1], [2]], num_experts=3, sequence=[sequence] * 3)
        assert rank_load(trace, plan, 1).tolist() == [[ranks.count(rank) for rank in range(4)]]


def test_the_owner_of_now_decides_which_replica_serves() -> None:
    assert messages([[2, 0]], MOVING, 1) == [1, 1]
    assert messages([[2, 0]], MOVING, 2) == [1, 0]


def test_a_plan_with_all_experts_everywhere_moves_nothing() -> None:
    plan = plan_of_slots([[0, 1, 2, 0, 1, 2]] * 2, Topology(gpus_per_node=2))
    assert messages([[[0, 1], [2, 0]], [[1, 2], [0, 1]]], plan, 1, sequence=[0, 1]) == [0, 0]
    assert messages([[[0, 1], [2, 0]], [[1, 2], [0, 1]]], plan, 2, sequence=[0, 1]) == [0, 0]


def test_remote_nodes_are_counted_once_each() -> None:
    """A token's experts on one, two and three of three nodes, seen from a rank of the first."""
    plan = make_plan(np.array([[0, 1, 2, 3, 4, 5]]), Topology(num_nodes=3, gpus_per_node=2))
    for chosen, nodes in (([0, 1], 0), ([2, 3], 1), ([1, 3, 2], 1), ([3, 4], 2), ([5, 0, 2, 4, 3], 2)):
        trace = RoutingTrace.from_arrays([[chosen]], num_experts=6)
        assert follow(trace, plan, 1).remote_nodes.tolist() == [nodes], chosen
    trace = RoutingTrace.from_arrays([[2], [3], [0], [5]], num_experts=6, sequence=[7, 7, 3, 3])
    assert follow(trace, plan, 1).remote_nodes.tolist() == [2, 2]  # at home on the ranks 3 and 1
    assert follow(trace, plan, 6).remote_nodes.tolist() == [2, 1]  # sequence 7 stays where expert 2 was


def test_load_and_locality_of_a_small_trace() -> None:
    trace = RoutingTrace.from_arrays([[[0, 1], [0, 1]], [[0, 2], [2, 0]]], num_experts=4)
    assert rank_load(trace, TWO_RANKS).tolist() == [[3, 1], [3, 1]]
    assert imbalance(trace, TWO_RANKS).tolist() == [1.5, 1.5]
    assert local_fraction(trace, TWO_RANKS).tolist() == [0.5]  # the second token's first choice moves


def test_load_is_that_of_the_strategy_unless_said_otherwise() -> None:
    trace = RoutingTrace.from_arrays([[2, 0]], num_experts=3)
    assert rank_load(trace, MOVING).tolist() == rank_load(trace, MOVING, 2).tolist() == [[0, 1], [0, 1]]
    at_home = replace(MOVING, strategy="dispatch-combine")
    assert rank_load(trace, at_home).tolist() == rank_load(trace, MOVING, 1).tolist() == [[0, 1], [1, 0]]
    assert imbalance(trace, at_home).tolist() == imbalance(trace, MOVING, 1).tolist() == [2.0, 2.0]


def test_replicas_on_one_rank_make_a_move_local() -> None:
    plan = plan_of_slots([[0, 1, 1, 2], [0, 2, 1, 2]], Topology(gpus_per_node=2))
    trace = RoutingTrace.from_arrays([[0, 2], [1, 1], [1, 0], [2, 0]], num_experts=3)
    assert local_fraction(trace, plan).tolist() == [0.75]  # 2 is on rank 1 alone, 0 on rank 0


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
