import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.plan.replicas import TURNS, ReplicaRule, hosting, serving_slots
from exflow.placement.plan.topology import Topology

Case = tuple[np.ndarray, int, Topology]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A map [L, P], E and a topology: experts twice on a rank, or in no slot of a layer."""
    topology = Topology(num_nodes=draw(st.integers(1, 4)), gpus_per_node=draw(st.integers(1, 4)))
    num_slots = topology.num_ranks * draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, num_experts, (draw(st.integers(1, 3)), num_slots)), num_experts, topology


def served(slots: list[int], topology: Topology) -> list[int]:
    """The ranks that a token owned by rank 0, 1, ... goes to for expert 1; `slots` is one layer's map."""
    serving = serving_slots(np.array([slots]), 2, topology)[0, :, 0, 1]
    return (serving // (len(slots) // topology.num_ranks)).tolist()


def test_the_example_in_the_docstring() -> None:
    slots = np.array([[1, 0, 0, 2]])
    assert serving_slots(slots, 3, Topology(gpus_per_node=4))[0, :, 0, 0].tolist() == [1, 1, 2, 2]


def test_an_only_replica_serves_everyone() -> None:
    assert served([0, 1, 0, 0], Topology(num_nodes=2, gpus_per_node=2)) == [1, 1, 1, 1]


def test_the_replica_on_the_node_serves() -> None:
    assert served([0, 1, 1, 0], Topology(num_nodes=2, gpus_per_node=2)) == [1, 1, 2, 2]


def test_nodes_without_a_replica_take_turns_together() -> None:
    topology = Topology(num_nodes=3, gpus_per_node=2)
    assert served([0, 0, 1, 1, 0, 0], topology) == [2, 3, 2, 3, 3, 2]
    assert served([0, 0, 1, 0, 1, 0], topology) == [2, 4, 2, 2, 4, 4]


def test_of_two_replicas_on_one_rank_the_first_serves_it_and_others_take_turns() -> None:
    serving = serving_slots(np.array([[1, 1, 0, 0, 0, 0]]), 2, Topology(gpus_per_node=3))[0]
    assert serving[:, 0, 1].tolist() == [0, 0, 1]


def test_an_expert_that_a_layer_lacks_is_served_by_none() -> None:
    slots = np.array([[0, 1, 2, 0], [0, 1, 1, 0]])
    serving = serving_slots(slots, 3, Topology(gpus_per_node=2))[0]
    assert serving[:, 0, 2].tolist() == [2, 2]
    assert serving[:, 1, 2].tolist() == [-1, -1]
    assert not hosting(slots, 3, 2)[1, 2].any()


def test_hosts_are_the_ranks_with_a_replica() -> None:
    hosts = hosting(np.array([[0, 1, 1, 1], [1, 0, 0, 1]]), 2, 2)
    assert hosts.tolist() == [[[True, False], [True, True]], [[True, True], [True, True]]]


@settings(deadline=None, max_examples=200)
@given(cases())
def test_everyone_is_served_by_the_nearest(case: Case) -> None:
    slots, num_experts, topology = case
    per_rank, node = slots.shape[1] // topology.num_ranks, topology.node_of_rank
    serving, hosts = (
        serving_slots(slots, num_experts, topology)[0],
        hosting(slots, num_experts, topology.num_ranks),
    )
    for (rank, layer, expert), slot in np.ndenumerate(serving):
        having = np.flatnonzero(hosts[layer, expert])
        assert set(np.flatnonzero(slots[layer] == expert) // per_rank) == set(having)
        if not len(having):
            assert slot == -1
            continue
        server = slot // per_rank
        assert slots[layer, slot] == expert
        if rank in having:
            assert server == rank
        elif node[rank] in node[having]:
            assert node[server] == node[rank]


@settings(deadline=None, max_examples=200)
@given(cases())
def test_turns_are_even(case: Case) -> None:
    """Ranks without a near replica take turns: no replica serves two more than another, nor in a node."""
    slots, num_experts, topology = case
    node = topology.node_of_rank
    serving, hosts = (
        serving_slots(slots, num_experts, topology)[0],
        hosting(slots, num_experts, topology.num_ranks),
    )
    node_of_slot = np.repeat(node, slots.shape[1] // topology.num_ranks)
    for layer, expert in np.argwhere(hosts.any(axis=2)):
        replicas, having = np.flatnonzero(slots[layer] == expert), np.flatnonzero(hosts[layer, expert])
        far = ~np.isin(node, node[having])
        turns = [(far, replicas)]
        for place in np.unique(node[having]):
            guests = (node == place) & ~hosts[layer, expert]
            turns.append((guests, replicas[node_of_slot[replicas] == place]))
        for guests, able in turns:
            taken = (serving[guests, layer, expert][:, None] == able).sum(axis=0)
            assert taken.sum() == guests.sum()
            assert taken.max() - taken.min() <= 1


@pytest.mark.parametrize("per_rank", [1, 2])
def test_where_every_rank_has_every_expert_each_serves_itself(per_rank: int) -> None:
    topology = Topology(num_nodes=2, gpus_per_node=2)
    slots = np.tile(np.arange(per_rank), 4)[None]
    served_by = serving_slots(slots, per_rank, topology)[0, :, 0] // per_rank
    assert (served_by == np.arange(4)[:, None]).all()


@settings(deadline=None, max_examples=100)
@given(cases())
def test_rules_of_engines(case: Case) -> None:
    """Replica "rank modulo number" for vllm-ascend; in the order of a batch's choices for vLLM."""
    slots, num_experts, topology = case
    by_rank = serving_slots(slots, num_experts, topology, ReplicaRule.BY_RANK)[0]
    in_turn = serving_slots(slots, num_experts, topology, ReplicaRule.IN_TURN)
    assert len(in_turn) == (TURNS if slots.shape[1] > num_experts else 1)
    for (rank, layer, expert), slot in np.ndenumerate(by_rank):
        replicas = np.flatnonzero(slots[layer] == expert)
        if not len(replicas):
            assert slot == -1
            continue
        assert slot == replicas[rank % len(replicas)]
        if len(in_turn) > 1:
            assert in_turn[:, rank, layer, expert].tolist() == np.resize(replicas, TURNS).tolist()
