"""Every reader, with small valid files."""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.robustness.fuzz.checkpoints import checkpoints, configurations
from benchmarks.robustness.fuzz.inputs import Target
from exflow.placement.formats.importers.registry import read_plan
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.plan.topology_file import load_topology
from exflow.placement.time.machines import load_machine
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.loads import read_loads
from exflow.profiling.importers.registry import import_trace
from exflow.profiling.trace import RoutingTrace
from exflow.train.config import load_train_config

ROOT = Path(__file__).parents[3]


def targets() -> list[Target]:
    torch.set_num_threads(1)  # children are forked
    return [*_own_files(), *configurations(), *checkpoints(), *_imports(), *_placements(), *_loads()]


def _own_files() -> Iterator[Target]:
    ids = np.array([[[0, 3], [2, 1]], [[1, 0], [3, 2]], [[2, 3], [0, 1]], [[0, 1], [1, 2]]])
    trace = RoutingTrace.from_arrays(ids, num_experts=4, moe_layer_ids=[1, 3], weights=np.ones(ids.shape))
    topology = Topology(num_nodes=2, gpus_per_node=1, link_cost=((0.0, 2.0), (2.0, 0.0)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        trace.save(folder / "trace", shard_tokens=2)
        files = {path.name: path.read_bytes() for path in (folder / "trace").iterdir()}
        slots = np.array([[0, 2, 1, 3], [3, 1, 0, 2]])
        Plan.of_slots(slots, topology, trace, method="by hand").save(folder / "plan.json")
        plan = (folder / "plan.json").read_bytes()
    yield Target("trace index", files, ("index.json",), lambda at: RoutingTrace.load(at).digest())
    shards = tuple(name for name in files if name != "index.json")
    yield Target("trace shard", files, shards, lambda at: RoutingTrace.load(at).digest())
    yield _of_one("plan", "plan.json", plan, Plan.load)
    for name in ("topology-2x8", "topology-graph"):
        content = (ROOT / "configs" / f"{name}.yaml").read_bytes()
        yield _of_one(name.replace("-", " "), "topology.yaml", content, load_topology)
    link = {"latency_s": 1e-6, "bytes_per_s": 1e11}
    machine = {"inside": link, "between": link, "read_bytes_per_s": 4e12, "memory_bytes": 1.4e11}
    machine |= {"layer_s": 1e-5, "round_bytes": 64, "transport": "collective", "shared": False}
    yield _of_one("machine", "machine.yaml", json.dumps(machine, indent=1).encode(), load_machine)
    train = (ROOT / "configs" / "gpt-moe-tiny.yaml").read_bytes()
    yield _of_one("training", "train.yaml", train, load_train_config)


def _of_one(name: str, file: str, content: bytes, read: Callable[[Path], object]) -> Target:
    return Target(name, {file: content}, (file,), lambda folder: read(folder / file))


def _imports() -> Iterator[Target]:
    golden = ROOT / "tests" / "profiling" / "golden"
    ids = np.array([[[0, 3], [2, 1]], [[1, 0], [3, 2]]], np.uint8)
    packed = io.BytesIO()
    np.savez_compressed(packed, experts=ids, seq=np.array([0, 1]), pos=np.array([0, 0]), num_experts=8)
    files = {
        "sglang": ("sglang", golden / "expert_distribution_recorder_2_1.pt"),
        "npz": ("npz", None),
        "npy": ("npy", golden / "routed_experts.npy"),
        "trtllm": ("trtllm", golden / "trtllm" / "rank0_raw.safetensors"),
        "megatron": ("megatron", golden / "router_trace_rank0.jsonl"),
        "responses vllm": ("responses", golden / "vllm.json"),
        "responses sglang": ("responses", golden / "sglang.json"),
    }
    for label, (format, path) in files.items():
        known = {"data": packed.getvalue() if path is None else path.read_bytes()}
        if format == "trtllm":
            known["meta_info.json"] = (golden / "trtllm" / "meta_info.json").read_bytes()
        yield Target(f"import {label}", known, tuple(known), partial(_imported, format))


def _imported(format: str, folder: Path) -> None:
    hints = Hints(num_experts=8, hidden_layers=4, top_k=2)
    import_trace([folder / "data"], folder / "out", format, hints, lambda done, total: None)


def _placements() -> Iterator[Target]:
    golden = ROOT / "tests" / "placement" / "golden"
    sidecar = (golden / "sidecar.meta.json").read_bytes()
    for path in sorted(golden.iterdir()):
        if path.name != "sidecar.meta.json":
            known = {"data": path.read_bytes(), "data.meta.json": sidecar}
            yield Target(f"placement {path.stem}", known, ("data",), partial(_placement, path.stem))
    yield Target("placement sidecar", known, ("data.meta.json",), partial(_placement, path.stem))


def _placement(format: str, folder: Path) -> Plan:
    return read_plan(folder / "data", format)


def _loads() -> Iterator[Target]:
    table = [[1, 2, 3, 4], [4, 3, 2, 1]]
    yield _of_one("loads JSON", "loads", json.dumps({"logical_count": table}).encode(), read_loads)
    archive = io.BytesIO()
    torch.save({"logical_count": torch.tensor([table])}, archive)
    yield _of_one("loads torch", "loads", archive.getvalue(), read_loads)
