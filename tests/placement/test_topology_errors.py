"""Topology files that are wrong, hostile or damaged are refused in one line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.files import MAX_YAML_BYTES
from exflow.placement.plan.topology_file import load_topology
from tests.placement.topologies import EQUAL, GRAPH, load, star

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
