"""Topology files in small."""

from pathlib import Path
from typing import Any

from exflow.placement.plan.topology import Topology
from exflow.placement.plan.topology_file import load_topology


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


def star(count: int, **link: Any) -> str:
    edges = [
        {"between": [f"g{number}", "switch"], "latency_us": 1, "bandwidth_gb_s": 8.192} | link
        for number in range(count)
    ]
    return str({"gpus": [f"g{number}" for number in range(count)], "edges": edges})
