import pytest

from exflow.errors import InputError
from exflow.placement.topology import Topology


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
