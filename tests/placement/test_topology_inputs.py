"""Topologies that people have at hand: output of `nvidia-smi topo -m`, and cost matrices in JSON."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.files import MAX_YAML_BYTES
from exflow.placement.plan.cost_matrix import load_cost_matrix
from exflow.placement.plan.nvidia_topo import BANDWIDTH_GB_S, is_link_matrix
from exflow.placement.plan.topology import Topology
from exflow.placement.plan.topology_file import load_topology

LINKS = [link for link in BANDWIDTH_GB_S if link != "X"]
COSTS = {link: 0.0 if link == "X" else round(8.192 / BANDWIDTH_GB_S[link], 6) for link in BANDWIDTH_GB_S}
PAIRS = """\
	\x1b[4mGPU0	GPU1	GPU2	GPU3	NIC0	CPU Affinity	NUMA Affinity	GPU NUMA ID\x1b[0m
GPU0	 X 	NV4	PHB	SYS	PIX	0-7,16-23	0		N/A
GPU1	NV4	 X 	NODE	SYS	NODE	0-7,16-23	0		N/A
GPU2	PHB	NODE	 X 	NV12	SYS	8-15,24-31	1		N/A
GPU3	SYS	SYS	NV12	 X 	SYS	8-15,24-31	1		N/A
NIC0	PIX	NODE	SYS	SYS	 X

Legend:

  X    = Self
  NV#  = some NVLinks

NIC Legend:

  NIC0: mlx5_0
"""


def load(folder: Path, text: str) -> Topology:
    path = folder / "saved"
    path.write_text(text, encoding="utf-8")
    return load_topology(path)


def costs_of(links: list[list[str]]) -> Topology:
    return Topology(
        gpus_per_node=len(links), link_cost=tuple(tuple(COSTS[link] for link in row) for row in links)
    )


def matrix(draw: st.DrawFn, entries: st.SearchStrategy[Any], diagonal: Any) -> list[list[Any]]:
    """Square and symmetric, of 1 to 8 GPUs."""
    count = draw(st.integers(1, 8))
    found = [[diagonal] * count for _ in range(count)]
    for row in range(count):
        for column in range(row):
            found[row][column] = found[column][row] = draw(entries)
    return found


# Output of nvidia-smi topo -m.


def test_nvlink_pairs_and_pcie_cost_what_the_table_says(tmp_path: Path) -> None:
    """8192 bytes at 100, 20, 10, 16 and 300 GB/s; network cards and affinities are left out."""
    assert load(tmp_path, PAIRS) == Topology(
        gpus_per_node=4,
        link_cost=(
            (0.0, 0.08192, 0.4096, 0.8192),
            (0.08192, 0.0, 0.512, 0.8192),
            (0.4096, 0.512, 0.0, 0.027307),
            (0.8192, 0.8192, 0.027307, 0.0),
        ),
    )


def test_every_link_costs_something_else() -> None:
    """More NVLinks cost less, and PCIe the more, the farther it leads."""
    assert [COSTS[link] for link in LINKS[:18]] == sorted({COSTS[link] for link in LINKS[:18]}, reverse=True)
    assert LINKS[17:] == ["NV18", "PIX", "PXB", "PHB", "NODE", "SYS"]
    assert len(set(COSTS.values())) == len(COSTS)
    assert COSTS["NV1"] < COSTS["PIX"] < COSTS["PXB"] < COSTS["PHB"] < COSTS["NODE"] < COSTS["SYS"]


def test_the_page_states_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "topology.md").read_text()
    for link in ("PIX", "PXB", "PHB", "NODE", "SYS"):
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{link}`"))
        assert row.endswith(f"| {BANDWIDTH_GB_S[link]:g} | {8.192 / BANDWIDTH_GB_S[link]:.6f} |")
    assert f"| {BANDWIDTH_GB_S['NV1']:g} * # | {8.192 / BANDWIDTH_GB_S['NV1']:.6f} / # |" in page


@pytest.mark.parametrize(
    "text",
    [
        PAIRS.replace("\x1b", ""),  # as a web page shows it
        PAIRS.expandtabs(8),
        PAIRS.replace("\n", "\r\n"),
        PAIRS[: PAIRS.index("NIC0	PIX")],
        f"$ nvidia-smi topo -m\n{PAIRS}",
        f"GPU models:\nGPU 0: one\n\n```\n{PAIRS}```\n",
        "\ufeff" + PAIRS,
    ],
    ids=["no escape", "blanks", "CRLF", "no legend", "prompt", "report", "mark"],
)
def test_what_stands_around_the_matrix_does_not_matter(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == load(tmp_path, PAIRS)


def test_one_gpu(tmp_path: Path) -> None:
    text = "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-31\t\tN/A\n"
    assert load(tmp_path, text) == Topology(gpus_per_node=1, link_cost=((0.0,),))


def test_yaml_with_names_as_nvidia_smi_has_them_stays_yaml(tmp_path: Path) -> None:
    text = """
# GPU0 X NV4
gpus: [
  GPU0
  , GPU1 ]
edges:
  - {between: [GPU0, GPU1], latency_us: 1, bandwidth_gb_s: 8.192}
"""
    assert load(tmp_path, text) == Topology(gpus_per_node=2, link_cost=((0.0, 2.0), (2.0, 0.0)))


@st.composite
def link_matrices(draw: st.DrawFn) -> list[list[str]]:
    return matrix(draw, st.sampled_from(LINKS), "X")


@settings(max_examples=60, deadline=None)
@given(
    links=link_matrices(), nics=st.integers(0, 3), affinity=st.booleans(), gap=st.sampled_from(["\t", "   "])
)
def test_a_matrix_that_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, links: list[list[str]], nics: int, affinity: bool, gap: str
) -> None:
    gpus = [f"GPU{number}" for number in range(len(links))]
    cards = [f"NIC{number}" for number in range(nics)]
    behind = (["CPU Affinity", "NUMA Affinity", "GPU NUMA ID"], ["0-3", "0", "N/A"]) if affinity else ([], [])
    lines = [["", *gpus, *cards, *behind[0]]]
    lines += [[gpu, *row, *["SYS"] * nics, *behind[1]] for gpu, row in zip(gpus, links, strict=True)]
    lines += [[card, *["SYS"] * len(gpus + cards)] for card in cards]
    text = "\n".join(gap.join(line) for line in lines)
    assert load(tmp_path_factory.mktemp("topo"), text) == costs_of(links)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PAIRS.replace("SYS	NV12", "SYS	NV19", 1),
            "GPU3 to GPU2 is 'NV19'; give X, NV1 to NV18, PIX, PXB, PHB",
        ),
        (PAIRS.replace("PHB	SYS", "OK	SYS"), "GPU0 to GPU2 is 'OK'; give X, NV1"),
        (
            PAIRS.replace("NV4	PHB	SYS	PIX", "NV4	PHB"),
            "the row GPU0 has 3 links for 5 columns; save the",
        ),
        (
            PAIRS.replace("	NODE	SYS	NODE", "	NODE	SYS	NODE	SYS"),
            "the row GPU1 has 6 links for 5 columns",
        ),
        (
            PAIRS.replace("GPU2	PHB	NODE	 X 	NV12", "GPU2"),
            "the row GPU2 has 1 links for 5 columns",
        ),
        (
            PAIRS.replace("\nGPU3	", "\nGPU4	"),
            "has columns ['GPU0', 'GPU1', 'GPU2', 'GPU3'], but rows ['GPU0', ",
        ),
        (
            PAIRS[: PAIRS.index("GPU2	PHB")],
            "has columns ['GPU0', 'GPU1', 'GPU2', 'GPU3'], but rows ['GPU0', ",
        ),
        (PAIRS + PAIRS, "has columns ['GPU0', 'GPU1', 'GPU2', 'GPU3'], but rows ['GPU0', "),
        (PAIRS[PAIRS.index("GPU0	 X") :], "GPU0 X NV4 stands where the names of the columns should; save"),
        (
            PAIRS[PAIRS.index("NIC0	PIX") :],
            "holds no column GPU0; save the whole output of nvidia-smi topo -m",
        ),
        (PAIRS.replace("GPU0	 X 	", "GPU0	NV1	"), "GPU0 to GPU0 is NV1; save"),
        (PAIRS.replace("GPU0	 X 	NV4", "GPU0	 X 	 X "), "GPU0 to GPU1 is X; save"),
        (
            PAIRS.replace("GPU0	 X 	NV4", "GPU0	 X 	NV2"),
            "GPU0 to GPU1 is NV2, but NV4 the other way; save",
        ),
    ],
)
def test_a_wrong_link_matrix_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'saved'}: {message}")
    assert len(str(caught.value).splitlines()) == 1


# Cost matrices.


def load_costs(folder: Path, content: Any, num_nodes: int = 1) -> Topology:
    path = folder / "costs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_cost_matrix(path, num_nodes)


def test_costs_are_those_of_the_matrix(tmp_path: Path) -> None:
    content = [[0, 1, 4, 4], [1, 0, 4, 4], [4, 4, 0, 1.5], [4, 4, 1.5, 0]]
    cost = ((0.0, 1.0, 4.0, 4.0), (1.0, 0.0, 4.0, 4.0), (4.0, 4.0, 0.0, 1.5), (4.0, 4.0, 1.5, 0.0))
    assert load_costs(tmp_path, content) == Topology(gpus_per_node=4, link_cost=cost)
    assert load_costs(tmp_path, content, 2) == Topology(num_nodes=2, gpus_per_node=2, link_cost=cost)
    assert load_costs(tmp_path, [[0]]) == Topology(gpus_per_node=1, link_cost=((0.0,),))


@st.composite
def cost_matrices(draw: st.DrawFn) -> list[list[float]]:
    return matrix(draw, st.floats(1e-9, 1e9) | st.integers(1, 10**9), 0)


@settings(max_examples=40, deadline=None)
@given(cost=cost_matrices())
def test_any_symmetric_matrix_is_read(
    tmp_path_factory: pytest.TempPathFactory, cost: list[list[float]]
) -> None:
    topology = load_costs(tmp_path_factory.mktemp("costs"), cost, len(cost))
    assert topology == Topology(num_nodes=len(cost), gpus_per_node=1, link_cost=tuple(map(tuple, cost)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0, 1]", "the cost matrix is not valid JSON ("),
        ({"cost": [[0]]}, "holds {'cost': [[0]]}; write a list of rows, with the costs of one GPU in each"),
        ([], "holds []; write a list of rows"),
        ([0, 1], "row 0 is 0; write a list of 2 costs"),
        ([[0, 1], [1, 0, 1]], "row 1 holds 3 costs, but there are 2 rows; give every GPU the cost to each"),
        ([[0, 1]], "row 0 holds 2 costs, but there are 1 rows; give every GPU the cost to each"),
        ([[]] * 4097, "holds 4097 rows; give 4096 GPUs at most"),
        (
            "[[0, NaN], [1, 0]]",
            "row 0, column 1 is nan; give a number from 1e-09 to 1e+09, or 0 on the diagonal",
        ),
        ("[[0, 1], [Infinity, 0]]", "row 1, column 0 is inf; give a number"),
        ("[[0, 1], [1e999, 0]]", "row 1, column 0 is inf; give a number"),
        (f"[[0, 1], [1{'0' * 400}, 0]]", "row 1, column 0 is 100000000000000000"),
        ([[0, -1], [-1, 0]], "row 0, column 1 is -1; give a number"),
        ([[0, "1"], [1, 0]], "row 0, column 1 is '1'; give a number"),
        ([[0, True], [True, 0]], "row 0, column 1 is True; give a number"),
        ([[0, None], [1, 0]], "row 0, column 1 is None; give a number"),
        (
            [[0, 0], [0, 0]],
            "topology: link_cost[0][1] is 0.0; give 0 on the diagonal and a positive number else",
        ),
        (
            [[1, 1], [1, 1]],
            "topology: link_cost[0][0] is 1.0; give 0 on the diagonal and a positive number else",
        ),
        (
            [[0, 1], [2, 0]],
            "topology: link_cost[0][1] is 1.0, but 2.0 the other way; give both ways the same",
        ),
    ],
)
def test_a_wrong_cost_matrix_is_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_costs(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'costs.json'}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_gpus_that_nodes_cannot_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"costs\.json: 3 GPUs cannot be spread evenly over 2 nodes"):
        load_costs(tmp_path, [[0, 1, 1], [1, 0, 1], [1, 1, 0]], 2)


@pytest.mark.parametrize("text", ["\n", " ", "\t\n", "[0", "\x1b[", "GPU0 ", "GPU0\n", "NV# ", "0"])
def test_telling_a_long_file_takes_no_quadratic_time(text: str) -> None:
    """A search that goes back over the blanks of many lines would take minutes here."""
    begin = time.process_time()
    is_link_matrix(text * (MAX_YAML_BYTES // len(text)))
    assert time.process_time() - begin < 5


@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.sampled_from([PAIRS, "[[0, 1, 2], [1, 0, 3.5], [2, 3.5, 0]]"]))
def test_damaged_text_gives_a_topology_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, text: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "damaged"
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        junk = data.draw(st.text(st.sampled_from('[]{},GPUXNV#0919eE-+.\x1b"\n \t\u2028'), max_size=4))
        text = text[:start] + junk + text[start + data.draw(st.integers(0, 4)) :]
    path.write_text(text, encoding="utf-8")
    for read in (load_topology, load_cost_matrix):
        try:
            read(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            assert len(str(error).splitlines()) == 1
