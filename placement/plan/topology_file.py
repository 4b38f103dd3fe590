"""Topology files (docs/topology.md): YAML of equal nodes or of any graph, or output of nvidia-smi topo -m."""

import reprlib
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Self

import networkx as nx
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from exflow.errors import InputError
from exflow.files import MAX_YAML_BYTES, read_yaml
from exflow.placement.plan.nvidia_topo import is_link_matrix, link_bandwidths
from exflow.placement.plan.topology import Topology
from exflow.validation import first_fault

MAX_GPUS = 4096
MESSAGE_BYTES = 8192  # a hidden state of 4096 in bf16
MAX_BANDWIDTHS = 16  # shortest paths are found once for each; real machines have a handful
DIGITS = 6  # of a cost in microseconds, after the point
SOURCES_AT_ONCE = 256  # of shortest paths, so that their distances to all nodes take little memory

Name = Annotated[str, Field(pattern=r"^\S{1,64}$")]
Count = Annotated[int, Field(ge=1, le=MAX_GPUS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Link(_Strict):
    """latency_us is what an empty message takes; it must not be 0, since no two GPUs are one."""

    latency_us: Annotated[float, Field(ge=0.001, le=1e6, allow_inf_nan=False)]
    bandwidth_gb_s: Annotated[float, Field(ge=0.001, le=1e6, allow_inf_nan=False)]


class Edge(Link):
    between: Annotated[list[Name], Field(min_length=2, max_length=2)]


class _Document(_Strict):
    message_bytes: Annotated[int, Field(ge=1, le=1 << 40)] = MESSAGE_BYTES


class EqualNodes(_Document):
    """Every two GPUs of a node are linked alike, and every two of different nodes."""

    nodes: Count
    gpus_per_node: Count
    intra_node: Link | None = None
    inter_node: Link | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nodes * self.gpus_per_node > MAX_GPUS:
            raise ValueError(
                f"nodes is {self.nodes} and gpus_per_node {self.gpus_per_node}; give {MAX_GPUS} GPUs at most"
            )
        for key, count in (("intra_node", self.gpus_per_node), ("inter_node", self.nodes)):
            if count > 1 and getattr(self, key) is None:
                raise ValueError(f"the key {key!r} is missing; add its latency_us and bandwidth_gb_s")
        return self


class AnyGraph(_Document):
    """`gpus` in order of rank; what else the edges name is a switch. `node_of` names the host of each GPU."""

    gpus: Annotated[list[Name], Field(min_length=1, max_length=MAX_GPUS)]
    node_of: dict[Name, Name] | None = None
    edges: list[Edge]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        twice = _first_repeated(self.gpus)
        if twice is not None:
            raise ValueError(f"gpus holds {twice!r} twice; name each GPU once")
        links = [tuple(sorted(edge.between)) for edge in self.edges]
        for one, other in links:
            if one == other:
                raise ValueError(f"edges holds a link from {one!r} to itself; remove it")
        double = _first_repeated(links)
        if double is not None:
            raise ValueError(
                f"edges holds the link between {double[0]!r} and {double[1]!r} twice; "
                "give one, with the bandwidth of both"
            )
        bandwidths = {edge.bandwidth_gb_s for edge in self.edges}
        if len(bandwidths) > MAX_BANDWIDTHS:
            raise ValueError(
                f"edges has {len(bandwidths)} values of bandwidth_gb_s; round them to {MAX_BANDWIDTHS}"
            )
        if self.node_of is not None:
            _check_hosts(self.gpus, self.node_of)
        return self


def load_topology(path: Path) -> Topology:
    """Read the file; the Topology's link_cost is in microseconds a message, rounded to a picosecond.

    Output of `nvidia-smi topo -m` is told by its content; anything else is YAML. Raises InputError, one line
    that names the file, where it cannot be read, is neither, or does not describe connected GPUs.
    """
    matrix = _link_matrix(path)
    content = None if matrix else read_yaml(path, "topology", "see docs/topology.md")
    try:
        return _of_links(matrix) if matrix else _of_document(_document(content))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _link_matrix(path: Path) -> str:
    """The text if the file is output of `nvidia-smi topo -m`, else nothing. A pipe, read once, is YAML."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_YAML_BYTES:
            return ""
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError:
        return ""  # reading it as YAML says why
    return text if is_link_matrix(text) else ""


def _of_links(matrix: str) -> Topology:
    cost = tuple(
        tuple(round(_transfer_us(MESSAGE_BYTES, bandwidth), DIGITS) for bandwidth in row)
        for row in link_bandwidths(matrix)
    )
    return Topology(gpus_per_node=len(cost), link_cost=cost)


def _of_document(document: EqualNodes | AnyGraph) -> Topology:
    if isinstance(document, EqualNodes):
        num_nodes, cost = document.nodes, _equal_costs(document)
    else:
        hosts = document.node_of
        num_nodes, cost = len(set(hosts.values())) if hosts else 1, _as_rows(_graph_costs(document))
    return Topology(num_nodes=num_nodes, gpus_per_node=len(cost) // num_nodes, link_cost=cost)


# A row holds one float object for each value, not for each pair: there are millions of pairs of 4096 GPUs
Rows = tuple[tuple[float, ...], ...]


def _equal_costs(document: EqualNodes) -> Rows:
    """[gpus][gpus]: microseconds of a message, put together from runs of GPUs with equal cost."""

    def price(link: Link | None) -> float:  # without a link, because no two GPUs need it
        if link is None:
            return 0.0
        return round(link.latency_us + _transfer_us(document.message_bytes, link.bandwidth_gb_s), DIGITS)

    near, far, size = price(document.intra_node), price(document.inter_node), document.gpus_per_node
    others = [(far,) * (size * count) for count in range(document.nodes)]
    node = [(near,) * rank + (0.0,) + (near,) * (size - 1 - rank) for rank in range(size)]
    return tuple(
        before + row + after for before, after in zip(others, others[::-1], strict=True) for row in node
    )


def _as_rows(cost: npt.NDArray[np.float64]) -> Rows:
    rows = []
    for row in np.round(cost, DIGITS):
        values, which = np.unique(row, return_inverse=True)
        rows.append(tuple(np.array(values.tolist(), object)[which].tolist()))
    return tuple(rows)


def _graph_costs(document: AnyGraph) -> npt.NDArray[np.float64]:
    """[gpus, gpus]: microseconds of a message along the best path.

    A path costs the sum of its latencies plus the time that its slowest link takes. For every bandwidth, the
    path of least latency over links no slower than that costs at most latency + time at that bandwidth; for
    the bandwidth of the best path's slowest link this is the best path. So the least of all is exact.
    """
    graph = nx.Graph()
    graph.add_nodes_from(document.gpus)
    for edge in document.edges:
        graph.add_edge(*edge.between, latency=edge.latency_us, bandwidth=edge.bandwidth_gb_s)
    _check_connected(graph, document.gpus)
    nodes, num_gpus = list(graph), len(document.gpus)  # the GPUs come first
    cost = np.full((num_gpus, num_gpus), np.inf)
    for slowest in sorted({edge.bandwidth_gb_s for edge in document.edges}):
        fast = nx.Graph()
        fast.add_nodes_from(nodes)
        fast.add_edges_from(link for link in graph.edges(data=True) if link[2]["bandwidth"] >= slowest)
        latency = nx.to_scipy_sparse_array(fast, nodelist=nodes, weight="latency", dtype=np.float64)
        path = _shortest_paths(latency, num_gpus)
        np.minimum(cost, path + _transfer_us(document.message_bytes, slowest), out=cost)
    upper = np.triu(cost, 1)  # both ways the same, though sums of floats depend on their order
    return np.asarray(upper + upper.T, dtype=np.float64)


def _shortest_paths(length: csr_array, num_gpus: int) -> npt.NDArray[np.float64]:
    """[gpus, gpus]: length of the shortest path between two GPUs; infinite without a path, meaningless on the
    diagonal.

    length: [nodes, nodes] of each link; the GPUs are the first nodes. A GPU with one link begins every path
    with it. So paths are sought from where it leads: once from a switch, not from each GPU that hangs on it.
    """
    first_link, start, first = length.indptr[:num_gpus], np.arange(num_gpus), np.zeros(num_gpus)
    hangs = np.diff(length.indptr)[:num_gpus] == 1
    start[hangs], first[hangs] = length.indices[first_link[hangs]], length.data[first_link[hangs]]
    sources, source = np.unique(start, return_inverse=True)
    path = np.empty((num_gpus, num_gpus))
    for begin in range(0, len(sources), SOURCES_AT_ONCE):
        found = dijkstra(length, indices=sources[begin : begin + SOURCES_AT_ONCE])[:, :num_gpus]
        here = (begin <= source) & (source < begin + SOURCES_AT_ONCE)
        path[here] = first[here, None] + found[source[here] - begin]
    return path


def _transfer_us(message_bytes: int, bandwidth_gb_s: float) -> float:
    return message_bytes / (bandwidth_gb_s * 1000)  # 1 GB/s is 1000 bytes a microsecond


def _check_connected(graph: nx.Graph, gpus: list[str]) -> None:
    reached = nx.node_connected_component(graph, gpus[0])
    for gpu in gpus:
        if gpu not in reached:
            raise InputError(f"edges: no path leads from {gpus[0]!r} to {gpu!r}; add the links between them")


def _check_hosts(gpus: list[str], node_of: dict[str, str]) -> None:
    """ValueError unless every GPU has a host, and hosts are runs of `gpus` of one length."""
    for gpu in gpus:
        if gpu not in node_of:
            raise ValueError(f"node_of has no host for {gpu!r}; give one for each GPU, or leave node_of out")
    unknown = sorted(node_of.keys() - set(gpus))
    if unknown:
        raise ValueError(f"node_of holds {unknown[0]!r}, which is not among gpus; remove it")
    runs = [(host, len(list(run))) for host, run in groupby(node_of[gpu] for gpu in gpus)]
    torn = _first_repeated([host for host, _ in runs])
    if torn is not None:
        raise ValueError(
            f"node_of: the GPUs of host {torn!r} are apart in gpus; list those of each host together"
        )
    for host, size in runs:
        if size != runs[0][1]:
            raise ValueError(
                f"node_of: host {runs[0][0]!r} has {runs[0][1]} GPUs and {host!r} has {size}; "
                "give every host as many"
            )


def _first_repeated(values: list[Any]) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _document(content: Any) -> EqualNodes | AnyGraph:
    if not isinstance(content, dict):
        raise InputError(
            f"holds {reprlib.repr(content)}, not keys; write nodes, gpus_per_node, intra_node and "
            "inter_node, or gpus and edges (docs/topology.md)"
        )
    kind = AnyGraph if content.keys() & {"gpus", "edges", "node_of"} else EqualNodes
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InputError(first_fault(kind, error, "see docs/topology.md")) from error
