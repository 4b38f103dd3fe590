"""Topologies from YAML: what a message costs, and what is said of a file that is wrong."""

import itertools
import random
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.plan.topology import Topology
from exflow.placement.plan.topology_file import load_topology
from tests.placement.topologies import EQUAL, GRAPH, load, star

CONFIGS = Path(__file__).parents[2] / "configs"
ROUNDING = 1e-6


def test_equal_nodes(tmp_path: Path) -> None:
    """100 kB take 0.25 us at 400 GB/s and 2 us at 50 GB/s."""
    assert load(tmp_path, EQUAL) == Topology(
        num_nodes=2,
        gpus_per_node=2,
        link_cost=(
            (0.0, 2.25, 7.0, 7.0),
            (2.25, 0.0, 7.0, 7.0),
            (7.0, 7.0, 0.0, 2.25),
            (7.0, 7.0, 2.25, 0.0),
        ),
    )


def test_a_message_is_a_hidden_state_of_4096_numbers_in_bf16_unless_said_otherwise(tmp_path: Path) -> None:
    topology = load(tmp_path, EQUAL.replace("message_bytes: 100_000", ""))
    assert topology.link_cost is not None
    assert topology.link_cost[0][1:3] == (2.02048, 5.16384)


def test_a_link_that_no_two_gpus_need_may_be_left_out(tmp_path: Path) -> None:
    link = "node: {latency_us: 1, bandwidth_gb_s: 8.192}"
    one_node = load(tmp_path, f"nodes: 1\ngpus_per_node: 2\nintra_{link}")
    assert one_node == Topology(gpus_per_node=2, link_cost=((0.0, 2.0), (2.0, 0.0)))
    single_gpus = load(tmp_path, f"nodes: 2\ngpus_per_node: 1\ninter_{link}")
    assert single_gpus == Topology(num_nodes=2, gpus_per_node=1, link_cost=((0.0, 2.0), (2.0, 0.0)))
    alone = Topology(gpus_per_node=1, link_cost=((0.0,),))
    assert load(tmp_path, "nodes: 1\ngpus_per_node: 1") == alone
    assert load(tmp_path, "gpus: [a]\nedges: []") == alone


def test_a_path_costs_its_latencies_and_the_time_of_its_slowest_link(tmp_path: Path) -> None:
    """20 kB take 1 us at 20 GB/s and 2 us at 10 GB/s, which is paid once, not in each link."""
    assert load(tmp_path, GRAPH) == Topology(
        num_nodes=2,
        gpus_per_node=2,
        link_cost=(
            (0.0, 2.0, 6.0, 7.0),
            (2.0, 0.0, 7.0, 8.0),
            (6.0, 7.0, 0.0, 2.0),
            (7.0, 8.0, 2.0, 0.0),
        ),
    )


@pytest.mark.parametrize(("message_bytes", "cost"), [(1_000, 2.0), (1_000_000, 13.0)])
def test_a_large_message_takes_the_fast_path_and_a_small_one_the_near_path(
    tmp_path: Path, message_bytes: int, cost: float
) -> None:
    text = f"""
gpus: [a, b]
edges:
  - {{between: [a, b], latency_us: 1, bandwidth_gb_s: 1}}
  - {{between: [a, s], latency_us: 1.5, bandwidth_gb_s: 100}}
  - {{between: [s, b], latency_us: 1.5, bandwidth_gb_s: 200}}
message_bytes: {message_bytes}
"""
    assert load(tmp_path, text) == Topology(gpus_per_node=2, link_cost=((0.0, cost), (cost, 0.0)))


def test_without_hosts_all_gpus_are_on_one_node(tmp_path: Path) -> None:
    topology = load(tmp_path, GRAPH.replace("node_of: {a0: a, a1: a, b0: b, b1: b}", ""))
    assert (topology.num_nodes, topology.gpus_per_node) == (1, 4)


def test_the_examples_can_be_read() -> None:
    regular = load_topology(CONFIGS / "topology-2x8.yaml")
    assert (regular.num_nodes, regular.gpus_per_node) == (2, 8)
    graph = load_topology(CONFIGS / "topology-graph.yaml")
    assert (graph.num_nodes, graph.gpus_per_node) == (2, 4)
    assert graph.link_cost is not None
    # same switch; the host's other switch; the other host; 8192 B at 25, 20 and 12.5 GB/s
    assert [graph.link_cost[0][other] for other in (1, 2, 4)] == [1.52768, 2.8096, 5.85536]


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    """Connected: a random tree over GPUs and switches in random order, and some further links."""
    gpus = [f"g{number}" for number in range(draw(st.integers(1, 6)))]
    nodes = draw(st.permutations(gpus + [f"s{number}" for number in range(draw(st.integers(0, 4)))]))
    pairs = {(nodes[draw(st.integers(0, later - 1))], nodes[later]) for later in range(1, len(nodes))}
    others = [pair for pair in itertools.combinations(nodes, 2) if pair not in pairs]
    if others:
        pairs |= draw(st.sets(st.sampled_from(others), max_size=6))
    latency = st.floats(0.001, 10)
    bandwidth = st.sampled_from([0.5, 1.0, 12.5, 50.0, 400.0])
    edges = [
        {"between": list(pair), "latency_us": draw(latency), "bandwidth_gb_s": draw(bandwidth)}
        for pair in sorted(pairs)
    ]
    return {"gpus": gpus, "edges": edges, "message_bytes": draw(st.integers(1, 100_000))}


def costs(folder: Path, content: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.array(load(folder, yaml.safe_dump(content)).link_cost)


def cheapest_simple_path(content: dict[str, Any], one: str, other: str) -> float:
    """The oracle: every path that visits no node twice."""
    graph = nx.Graph()
    for edge in content["edges"]:
        graph.add_edge(*edge["between"], **edge)
    prices: list[float] = []
    for path in nx.all_simple_paths(graph, one, other):
        links = [graph.edges[link] for link in itertools.pairwise(path)]
        slowest = min(link["bandwidth_gb_s"] for link in links)
        prices.append(sum(link["latency_us"] for link in links) + content["message_bytes"] / slowest / 1000)
    return min(prices)


@settings(max_examples=40, deadline=None)
@given(content=graphs(), seed=st.integers(0, 2**32))
def test_costs_are_those_of_the_best_path_whatever_the_order_of_edges(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("graph")
    cost = costs(folder, content)
    assert (cost == cost.T).all()
    triangle = cost[:, :, None] + cost[None, :, :]  # by way of any other GPU
    assert (cost[:, None, :] <= triangle + 2 * ROUNDING).all()
    for (row, one), (column, other) in itertools.combinations(enumerate(content["gpus"]), 2):
        assert cost[row, column] == pytest.approx(cheapest_simple_path(content, one, other), abs=ROUNDING)

    shuffled = [
        edge | {"between": edge["between"][::turn]}
        for edge, turn in zip(content["edges"], itertools.cycle([1, -1]), strict=False)
    ]
    random.Random(seed).shuffle(shuffled)
    assert (costs(folder, content | {"edges": shuffled}) == cost).all()


def test_many_gpus_on_a_switch(tmp_path: Path) -> None:
    cost = np.array(load(tmp_path, star(300)).link_cost)
    np.testing.assert_array_equal(cost, np.where(np.eye(300), 0, 3.0))


def test_many_gpus_in_a_ring(tmp_path: Path) -> None:
    """More than the number of sources whose paths are found at once."""
    edges = [
        {"between": [f"g{number}", f"g{(number + 1) % 300}"], "latency_us": 1, "bandwidth_gb_s": 8.192}
        for number in range(300)
    ]
    cost = costs(tmp_path, {"gpus": [f"g{number}" for number in range(300)], "edges": edges})
    apart = np.abs(np.subtract.outer(np.arange(300), np.arange(300)))
    np.testing.assert_array_equal(cost, np.where(apart, np.minimum(apart, 300 - apart) + 1.0, 0))
