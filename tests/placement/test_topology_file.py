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

from exflow.errors import InputError
from exflow.files import MAX_YAML_BYTES
from exflow.placement.plan.topology import Topology
from exflow.placement.plan.topology_file import load_topology

CONFIGS = Path(__file__).parents[2] / "configs"
ROUNDING = 1e-6


def load(folder: Path, text: str) -> Topology:
    path = folder / "topology.yaml"
    path.write_text(text, encoding="utf-8")
    return load_topology(path)


EQUAL = """
nodes: 2
gpus_per_node: 2
intra_node: {latency_us: 2, bandwidth_gb_s: 400}
inter_node: {latency_us: 5, bandwidth_gb_s: 50}
message_bytes: 100_000
"""

GRAPH = """
gpus: [a0, a1, b0, b1]
node_of: {a0: a, a1: a, b0: b, b1: b}
edges:
  - {between: [a0, a1], latency_us: 1, bandwidth_gb_s: 20}
  - {between: [a0, nic_a], latency_us: 0.5, bandwidth_gb_s: 20}
  - {between: [b0, nic_b], latency_us: 0.5, bandwidth_gb_s: 20}
  - {between: [nic_a, nic_b], latency_us: 3, bandwidth_gb_s: 10}
  - {between: [b1, b0], latency_us: 1, bandwidth_gb_s: 20}
message_bytes: 20_000
"""


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


def star(count: int, **link: Any) -> str:
    edges = [
        {"between": [f"g{number}", "switch"], "latency_us": 1, "bandwidth_gb_s": 8.192} | link
        for number in range(count)
    ]
    return str({"gpus": [f"g{number}" for number in range(count)], "edges": edges})


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


EDGE = "{between: [a0, a1], latency_us: 1, bandwidth_gb_s: 20}"
SEE = "; see docs/topology.md"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # not the keys of either form
        (
            "",
            "holds None, not keys; write nodes, gpus_per_node, intra_node and inter_node, or gpus and edges "
            "(docs/topology.md)",
        ),
        ("[nodes, 2]", "holds ['nodes', 2], not keys; write nodes, gpus_per_node"),
        ("gpus_per_node: 2", "the key 'nodes' is missing; see docs/topology.md"),
        ("gpus: [a]", "the key 'edges' is missing; see docs/topology.md"),
        (EQUAL + "racks: 2", "unknown key 'racks'" + SEE),
        (GRAPH + "nodes: 2", "unknown key 'nodes'" + SEE),
        (EQUAL.replace("{latency_us: 2", "{hops: 3, latency_us: 2"), "unknown key 'intra_node.hops'" + SEE),
        (
            EQUAL.replace("latency_us: 5, ", ""),
            "the key 'inter_node.latency_us' is missing; see docs/topology.md",
        ),
        (
            GRAPH.replace("latency_us: 3, ", ""),
            "the key 'edges[3].latency_us' is missing; see docs/topology.md",
        ),
        # values
        (
            EQUAL.replace("nodes: 2", "nodes: 0"),
            "nodes = 0: Input should be greater than or equal to 1" + SEE,
        ),
        (EQUAL.replace("nodes: 2", "nodes: two"), "nodes = 'two': Input should be a valid integer" + SEE),
        (EQUAL.replace("nodes: 2", "nodes: yes"), "nodes = True: Input should be a valid integer" + SEE),
        (
            EQUAL.replace("nodes: 2", "nodes: 5000"),
            "nodes = 5000: Input should be less than or equal",
        ),
        (
            EQUAL.replace("nodes: 2", "nodes: 4096"),
            "nodes is 4096 and gpus_per_node 2; give 4096 GPUs at most",
        ),
        (
            EQUAL.replace("us: 5", "us: -5"),
            "inter_node.latency_us = -5: Input should be greater than or equal to 0.001" + SEE,
        ),
        (
            EQUAL.replace("s: 50}", "s: 1e3}"),
            "inter_node.bandwidth_gb_s = '1e3': Input should be a valid number",
        ),
        (EQUAL.replace("s: 50}", "s: .inf}"), "inter_node.bandwidth_gb_s = inf: Input should be"),
        (EQUAL.replace("s: 50}", "s: .nan}"), "inter_node.bandwidth_gb_s = nan: Input should be"),
        (EQUAL.replace("s: 50}", f"s: 0x{'f' * 250}}}"), "inter_node.bandwidth_gb_s = "),
        (
            EQUAL.replace("100_000", "0"),
            "message_bytes = 0: Input should be greater than or equal to 1" + SEE,
        ),
        (
            EQUAL.replace("intra_node: {latency_us: 2, bandwidth_gb_s: 400}", ""),
            "the key 'intra_node' is missing; add its latency_us and bandwidth_gb_s",
        ),
        (
            EQUAL.replace("inter_node: {latency_us: 5, bandwidth_gb_s: 50}", ""),
            "the key 'inter_node' is missing; add its latency_us and bandwidth_gb_s",
        ),
        # GPUs and links
        (GRAPH.replace("[a0, a1, b0", "[0, a1, b0"), "gpus[0] = 0: Input should be a valid string" + SEE),
        (GRAPH.replace("[a0, a1, b0", "['a 0', a1, b0"), "gpus[0] = 'a 0': String should match pattern"),
        ("gpus: []\nedges: []", "gpus = []: List should have at least 1 item"),
        (
            f"gpus: [{', '.join(f'g{number}' for number in range(4097))}]\nedges: []",
            "gpus = ['g0', 'g1', 'g2', 'g3', 'g4', 'g5', ...]: List should have at most 4096 items",
        ),
        (GRAPH.replace("[a0, a1, b0", "[a0, a0, b0"), "gpus holds 'a0' twice; name each GPU once"),
        (GRAPH.replace("[b1, b0]", "[b1]"), "edges[4].between = ['b1']: List should have at least 2 items"),
        (GRAPH.replace("[b1, b0]", "[b1, b1]"), "edges holds a link from 'b1' to itself; remove it"),
        (
            GRAPH.replace("[b1, b0]", "[a1, a0]"),
            "edges holds the link between 'a0' and 'a1' twice; give one, with the bandwidth of both",
        ),
        (
            GRAPH.replace("[b1, b0]", "[b1, b0_]"),
            "edges: no path leads from 'a0' to 'b1'; add the links between them",
        ),
        ("gpus: [a, b]\nedges: []", "edges: no path leads from 'a' to 'b'; add the links between them"),
        (
            str(
                yaml.safe_load(star(17))
                | {
                    "edges": [
                        {"between": [f"g{number}", "s"], "latency_us": 1, "bandwidth_gb_s": number + 1}
                        for number in range(17)
                    ]
                }
            ),
            "edges has 17 values of bandwidth_gb_s; round them to 16",
        ),
        # hosts
        (
            GRAPH.replace(", b1: b}", "}"),
            "node_of has no host for 'b1'; give one for each GPU, or leave node_of out",
        ),
        (GRAPH.replace("b1: b}", "b1: b, c1: c}"), "node_of holds 'c1', which is not among gpus; remove it"),
        (
            GRAPH.replace("a1: a, b0: b", "a1: b, b0: a"),
            "node_of: the GPUs of host 'a' are apart in gpus; list those of each host together",
        ),
        (
            GRAPH.replace("a1: a", "a1: b"),
            "node_of: host 'a' has 1 GPUs and 'b' has 3; give every host as many",
        ),
        (GRAPH.replace("a1: a", '"a\\n1": a'), r"node_of.a\n1.[key] = 'a\n1': String should match pattern"),
    ],
)
def test_a_wrong_topology_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'topology.yaml'}: {message}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nodes: [1", "line 1: expected ',' or ']', but got '<stream end>'"),
        ("nodes: 1\nnodes: 2", "line 2: the key 'nodes' is given twice"),
        ("nodes: &n 1", "line 1: anchors, aliases and tags are not for this file"),
        ("nodes: *n", "line 1: anchors, aliases and tags are not for this file"),
        ("nodes: !!python/object/apply:os.getcwd []", "line 1: anchors, aliases and tags are not"),
        ("nodes: !!bool maybe", "line 1: anchors, aliases and tags are not for this file"),
        ("nodes: 1\n---\nnodes: 2", "line 2: but found another document"),
        ("nodes: " + "1" * 5000, "line 1: a name or number has more than 4096 characters"),
        ("[1, 2]: 3", "line 1: found unhashable key"),
        ("nodes: 2024-13-45", "month must be in 1..12"),
        ("nodes: \x07", "unacceptable character #x0007: special characters are not allowed"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    path = tmp_path / "topology.yaml"
    assert str(caught.value).startswith(f"{path}: the topology is not YAML ({reason}")
    assert str(caught.value).endswith(SEE)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000])
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        InputError, match=r"topology\.yaml: the topology is not YAML \(nested too deeply\); see"
    ):
        load(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    with pytest.raises(InputError) as caught:
        load_topology(path)
    assert str(caught.value) == f"{path}: the topology cannot be read (No such file or directory){SEE}"
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        load_topology(tmp_path)
    path.write_bytes(b"nodes: \xff")
    with pytest.raises(InputError, match=r"the topology is not YAML .*can't decode byte 0xff"):
        load_topology(path)
    path.write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(InputError) as caught:
        load_topology(path)
    assert str(caught.value) == f"{path}: the topology is longer than 1048576 bytes{SEE}"


@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.sampled_from([EQUAL, GRAPH]))
def test_damaged_text_gives_a_topology_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, text: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        junk = data.draw(st.text(st.sampled_from("{}[]:,-&*!#'\"\n \t09.eabx\u2028"), max_size=4))
        text = text[:start] + junk + text[start + data.draw(st.integers(0, 4)) :]
    try:
        load(folder, text)
    except InputError as error:
        assert str(error).startswith(f"{folder / 'topology.yaml'}: ")
        assert len(str(error).splitlines()) == 1
