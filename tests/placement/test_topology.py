import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.plan.topology import Topology, topology_of


def test_two_nodes_of_three() -> None:
    topology = Topology(num_nodes=2, gpus_per_node=3)
    assert topology.num_ranks == 6
    assert topology.node_of_rank.tolist() == [0, 0, 0, 1, 1, 1]
    assert str(topology) == "6 ranks (2 nodes of 3)"


def test_one_node_unless_said_otherwise() -> None:
    assert Topology(gpus_per_node=4) == Topology(num_nodes=1, gpus_per_node=4)
    assert str(Topology(gpus_per_node=4)) == "4 ranks (1 node of 4)"


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"num_nodes": 0, "gpus_per_node": 4}, "topology: num_nodes is 0; it must be at least 1"),
        ({"num_nodes": 1, "gpus_per_node": -2}, "topology: gpus_per_node is -2; it must be at least 1"),
    ],
)
def test_counts_below_one_are_refused(counts: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as error:
        Topology(**counts)
    assert str(error.value) == message


def test_a_message_between_nodes_costs_eight_inside() -> None:
    assert Topology(num_nodes=2, gpus_per_node=2).distance.tolist() == [
        [0, 1, 8, 8],
        [1, 0, 8, 8],
        [8, 8, 0, 1],
        [8, 8, 1, 0],
    ]


@pytest.mark.parametrize("topology", [Topology(gpus_per_node=3), Topology(num_nodes=3, gpus_per_node=1)])
def test_where_all_links_are_alike_a_message_costs_one(topology: Topology) -> None:
    assert topology.distance.tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_one_rank_has_no_links() -> None:
    assert Topology(gpus_per_node=1).distance.tolist() == [[0]]
    assert Topology(gpus_per_node=1, link_cost=((0,),)).distance.tolist() == [[0]]


def test_links_are_measured_by_the_cheapest() -> None:
    cost = ((0, 4, 10), (4, 0, 6), (10, 6, 0))
    topology = Topology(gpus_per_node=3, link_cost=cost)
    assert topology.distance.tolist() == [[0, 1, 2.5], [1, 0, 1.5], [2.5, 1.5, 0]]
    assert topology == Topology(gpus_per_node=3, link_cost=cost) != Topology(gpus_per_node=3)
    assert topology.link_cost == cost


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_distance_is_symmetric_and_at_least_one(nodes: int, gpus: int, seed: int, links: bool) -> None:
    ranks = nodes * gpus
    one_way = np.triu(np.random.default_rng(seed).uniform(0.1, 100, (ranks, ranks)), 1)
    cost = tuple(map(tuple, (one_way + one_way.T).tolist())) if links else None
    distance = Topology(num_nodes=nodes, gpus_per_node=gpus, link_cost=cost).distance
    assert (distance == distance.T).all()
    assert not distance.diagonal().any()
    elsewhere = distance[~np.eye(ranks, dtype=bool)]
    assert not len(elsewhere) or elsewhere.min() == 1
    if links and ranks > 1:
        np.testing.assert_allclose(distance, (one_way + one_way.T) / one_way[one_way > 0].min())


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (((0, 1),), "link_cost is not 2 rows of 2; give one for each rank"),
        (((0, 1), (1,)), "link_cost is not 2 rows of 2; give one for each rank"),
        (
            ((0, 0), (0, 0)),
            "link_cost[0][1] is 0; give 0 on the diagonal and a positive number elsewhere",
        ),
        (
            ((0, -1.5), (-1.5, 0)),
            "link_cost[0][1] is -1.5; give 0 on the diagonal and a positive number elsewhere",
        ),
        (
            ((0, 1), (1, 2)),
            "link_cost[1][1] is 2; give 0 on the diagonal and a positive number elsewhere",
        ),
        (
            ((0, math.inf), (math.inf, 0)),
            "link_cost[0][1] is inf; give 0 on the diagonal and a positive number elsewhere",
        ),
        (
            ((math.nan, 1), (1, 0)),
            "link_cost[0][0] is nan; give 0 on the diagonal and a positive number elsewhere",
        ),
        (
            ((0, 1), (2, 0)),
            "link_cost[0][1] is 1, but 2 the other way; give both ways the same cost",
        ),
    ],
)
def test_costs_that_are_no_distances_are_refused(cost: tuple[tuple[float, ...], ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        Topology(gpus_per_node=2, link_cost=cost)
    assert str(error.value) == f"topology: {message}"


def test_gpus_are_spread_evenly_over_nodes() -> None:
    assert topology_of(gpus=6, nodes=2) == Topology(num_nodes=2, gpus_per_node=3)
    with pytest.raises(InputError) as error:
        topology_of(gpus=6, nodes=4)
    assert str(error.value) == "6 GPUs cannot be spread evenly over 4 nodes; give a multiple of 4"
