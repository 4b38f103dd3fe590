"""Our files through the engines' own code, and its files through ours.

Engines are large, want GPUs and pull in hundreds of packages, so their code is not imported but taken from
its source files: those of an installed package, or of the folder that EXFLOW_ENGINES names, where it lies
unpacked as

    sglang/       the wheel's package             vllm/         the wheel's package
    vllm_ascend/  of vllm-project/vllm-ascend     tensorrt_llm/ of NVIDIA/TensorRT-LLM
    EPLB/         deepseek-ai/EPLB                ExFlow/       YJHMITWEB/ExFlow

What a file imports of its engine is replaced by stand-ins that say "CPU, so many ranks". An engine that is
not there skips its tests.
"""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
import yaml

from exflow.placement.eplb import rebalance_experts
from exflow.placement.formats.exporters.registry import export_plan
from exflow.placement.formats.importers.registry import read_plan
from exflow.placement.plan.logical_maps import logical_maps
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.load_only import load_only
from exflow.profiling.trace import RoutingTrace

LAYERS, EXPERTS, RANKS, REDUNDANT = (1, 2, 4), 8, 4, 4


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Six hidden layers, three of them with eight experts, in twelve slots on two nodes of two GPUs."""
    load = np.random.default_rng(0).integers(1, 100, (len(LAYERS), EXPERTS))
    return Plan(
        model="small",
        num_hidden_layers=6,
        moe_layer_ids=LAYERS,
        num_experts=EXPERTS,
        topology=Topology(num_nodes=2, gpus_per_node=2),
        physical_to_logical_map=load_only(load, RANKS, 2, EXPERTS + REDUNDANT),
        next_owner=None,
        method="load-only",
    )


def sglang(path: Path, run_engine_file: Callable[..., Any], redundant: int, a2a: str) -> Any:
    """The metadata that SGLang makes of the file, on rank 1."""
    dispatch = "dynamic" if a2a == "none" else "static"
    moe = SimpleNamespace(
        init_expert_location=str(path),
        ep_num_redundant_experts=redundant,
        moe_a2a_backend=a2a,
        ep_dispatch_algorithm=dispatch,
        ep_join_mode=None,
    )
    parallel = SimpleNamespace(ep_size=RANKS, nnodes=2, elastic_ep_initial_size=None)
    module = run_engine_file(
        "sglang/srt/eplb/expert_location.py",
        sglang__srt__runtime_context={
            "get_device": lambda: SimpleNamespace(device="cpu"),
            "get_exec": lambda: SimpleNamespace(moe=moe),
            "get_parallel": lambda: parallel,
            "get_resources": lambda: None,
        },
        sglang__srt__elastic_ep__elastic_ep={"elastic_expanded_world_enabled": lambda: False},
        sglang__srt__model_loader={"get_model_architecture": lambda _: (architecture, None)},
    )
    shape = module.ModelConfigForExpertLocation(num_layers=6, num_logical_experts=EXPERTS)
    architecture = SimpleNamespace(get_model_config_for_expert_location=lambda _: shape)
    config = SimpleNamespace(hf_config=None)
    return module.compute_initial_expert_location_metadata(config, moe_ep_rank=1)


def test_sglang_reads_the_map(plan: Plan, tmp_path: Path, run_engine_file: Callable[..., Any]) -> None:
    path = tmp_path / "map.json"
    export_plan(plan, "sglang", path)
    read = sglang(path, run_engine_file, REDUNDANT, "none")
    assert read.physical_to_logical_map[list(LAYERS)].tolist() == plan.physical_to_logical_map.tolist()
    physical, count = logical_maps(plan.physical_to_logical_map, EXPERTS)
    width = physical.shape[2]
    assert read.logical_to_all_physical_map[list(LAYERS), :, :width].tolist() == physical.tolist()
    assert read.logical_to_all_physical_map_num_valid[list(LAYERS)].tolist() == count.tolist()


def test_sglang_serves_from_the_nearest_replica(
    plan: Plan, tmp_path: Path, run_engine_file: Callable[..., Any]
) -> None:
    """SGLang takes the slot that we count where rank 1 has a replica itself."""
    path = tmp_path / "map.json"
    export_plan(plan, "sglang", path)
    chosen = sglang(path, run_engine_file, REDUNDANT, "deepep").logical_to_rank_dispatch_physical_map
    here = plan.hosts[:, :, 1]
    assert here.any()
    assert (chosen[list(LAYERS)].numpy()[here] == plan.serving_slot[1][here]).all()


def test_sglang_refuses_a_further_key(
    plan: Plan, tmp_path: Path, run_engine_file: Callable[..., Any]
) -> None:
    """Why the rest is in a sidecar."""
    path = tmp_path / "map.json"
    export_plan(plan, "sglang", path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "small"}))
    with pytest.raises(TypeError, match="unexpected keyword argument 'model'"):
        sglang(path, run_engine_file, REDUNDANT, "deepep")


def test_tensorrt_llm_reads_the_map(
    plan: Plan, tmp_path: Path, run_engine_definition: Callable[..., Any]
) -> None:
    class StrictBaseModel(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")

    config_class = run_engine_definition(
        "tensorrt_llm/llmapi/llm_args.py",
        "MoeLoadBalancerConfig",
        StrictBaseModel=StrictBaseModel,
        Field=pydantic.Field,
        PrivateAttr=pydantic.PrivateAttr,
        Optional=__import__("typing").Optional,
        Dict=dict,
        List=list,
    )
    path = tmp_path / "map.yaml"
    export_plan(plan, "trtllm", path)
    config = config_class(**yaml.safe_load(path.read_text()))
    config.setup(ep_rank=1, ep_size=RANKS)
    assert config.layer_updates_per_iter == 0
    assert (config.slot_start, config.slot_end) == (3, 6)
    for layer, row in zip(LAYERS, plan.physical_to_logical_map.tolist(), strict=True):
        assert config.get_layer_initial_global_assignments(layer) == row
    with pytest.raises(KeyError):
        config.get_layer_initial_global_assignments(6)  # what an MTP layer would ask for


def vllm_ascend(
    path: Path, run_engine_file: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """Return the engine's tables of the file on rank 1, for each MoE layer."""
    monkeypatch.setattr(torch.Tensor, "npu", lambda self: self, raising=False)
    module = run_engine_file(
        "vllm_ascend/eplb/core/eplb_utils.py",
        vllm__logger={"logger": SimpleNamespace(warning=print)},
        vllm__model_executor__layers__fused_moe__expert_map_manager={"determine_expert_map": None},
    )
    settings = SimpleNamespace(expert_map_path=str(path), dynamic_eplb=False, num_redundant_experts=0)
    model = SimpleNamespace(num_experts=EXPERTS, ep_size=RANKS, ep_rank=1)
    return [module.init_eplb_config(settings, layer, model) for layer in range(len(LAYERS))]


def test_vllm_ascend_reads_the_map(
    plan: Plan, tmp_path: Path, run_engine_file: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "map.json"
    export_plan(plan, "vllm-ascend", path)
    for row, (maps, mine, logical_to_physical, redundant) in zip(
        plan.physical_to_logical_map, vllm_ascend(path, run_engine_file, monkeypatch), strict=True
    ):
        assert redundant == REDUNDANT
        for slot, expert in enumerate(row):
            rank, place = divmod(slot, plan.slots_per_rank)
            assert maps[rank, expert] == place
        assert torch.equal(maps[1], mine)
        assert (maps >= 0).sum() == plan.num_slots
        assert row[logical_to_physical.numpy()].tolist() == list(range(EXPERTS))


def test_vllm_releases_read_no_map_yet(engine_file: Callable[[str], Path]) -> None:
    """A failure here means that vLLM now reads a map: write an exporter for its format."""
    tree = ast.parse(engine_file("vllm/config/parallel.py").read_text(encoding="utf-8"))
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EPLBConfig")
    names = {ast.unparse(node.target) for node in config.body if isinstance(node, ast.AnnAssign)}
    assert "num_redundant_experts" in names
    assert not {name for name in names if name.endswith(("path", "file", "map"))}


def test_vllm_makes_the_same_tensors_of_the_map(
    plan: Plan, tmp_path: Path, run_engine_definition: Callable[..., Any]
) -> None:
    path = tmp_path / "map.json"
    export_plan(plan, "vllm", path)
    compute = run_engine_definition(
        "vllm/distributed/eplb/eplb_state.py", "compute_logical_maps", torch=torch
    )
    physical, count = compute(torch.tensor(json.loads(path.read_text())), EXPERTS)
    ours = logical_maps(plan.physical_to_logical_map, EXPERTS)
    assert (physical.tolist(), count.tolist()) == (ours[0].tolist(), ours[1].tolist())


@pytest.mark.parametrize("kind", ["zipf", "uniform", "ties", "idle"])
@pytest.mark.parametrize(
    "shape",
    [
        (12, 16, 4, 2, 8),
        (256, 288, 8, 4, 32),
        (256, 320, 8, 40, 320),
        (64, 64, 1, 1, 8),
        (64, 96, 8, 2, 16),
        (60, 64, 3, 2, 8),
        (8, 24, 2, 4, 12),
        (30, 48, 4, 3, 8),
    ],
)
def test_deepseek_eplb_is_matched(
    shape: tuple[int, ...], kind: str, run_engine_file: Callable[..., Any]
) -> None:
    """The same forms of results, and no layer's busiest GPU has more than by the original."""
    original = run_engine_file("EPLB/eplb.py").rebalance_experts
    num_experts, num_replicas, num_groups, num_nodes, num_gpus = shape
    rng = np.random.default_rng(1)
    loads = {
        "zipf": rng.zipf(1.6, (8, num_experts)).clip(max=1000),
        "uniform": rng.random((8, num_experts)),
        "ties": rng.integers(0, 4, (8, num_experts)),
        "idle": np.concatenate([np.zeros((1, num_experts)), rng.random((7, num_experts))]),
    }
    weight = torch.from_numpy(loads[kind])
    busiest, widths = [], []
    for rebalance in (rebalance_experts, original):
        slots, physical, count = rebalance(weight, num_replicas, num_groups, num_nodes, num_gpus)
        assert (slots.dtype, physical.dtype, count.dtype) == (torch.int64,) * 3
        assert slots.shape == (8, num_replicas) and count.shape == weight.shape
        assert physical.shape[:2] == weight.shape
        found = [sorted(row[row >= 0].tolist()) for row in physical.flatten(0, 1)]
        assert found == [torch.where(row == e)[0].tolist() for row in slots for e in range(num_experts)]
        each = (weight / count).gather(1, slots).view(8, num_gpus, -1).sum(dim=2).double()
        busiest.append(each.max(dim=1).values)
        widths.append(physical.shape[2])
    ours, theirs = busiest
    print(f"{shape}: busiest GPU, ours over the original's {(ours / theirs).nanmean():.4f}")
    assert (ours <= theirs * (1 + 1e-6)).all()
    assert widths[0] == widths[1]


def test_solutions_of_the_original_exflow(engine_file: Callable[[str], Path]) -> None:
    """Its own files, of layers of 8 experts on 4 and on 8 GPUs, are read as plans."""
    files = sorted(engine_file("ExFlow/solutions").glob("*.csv"))
    assert files
    for path in files:
        text = path.read_bytes()
        num_layers = (text.count(b"\r\n") - 1) // 8
        trace = RoutingTrace.from_arrays(np.zeros((1, num_layers), int), num_experts=8)
        plan = read_plan(path, trace=trace)
        ids, ranks = np.loadtxt(path, dtype=int, delimiter=",", skiprows=1).T
        assert plan.rank_of_expert.ravel()[ids].tolist() == ranks.tolist()
