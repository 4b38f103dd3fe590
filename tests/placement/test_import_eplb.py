"""Slot tables of EPLB and of SGLang's rebalance_experts, in any order, width and dtype."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save_file as save_torch

from exflow.placement.eplb import rebalance_experts
from exflow.placement.formats.importers.registry import read_plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace


def trace_of(num_layers: int, num_experts: int) -> RoutingTrace:
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(num_experts), (40, num_layers, 1)), axis=2)[:, :, :2]
    return RoutingTrace.from_arrays(experts, num_experts=num_experts)


EPLB_NAMES = ("physical_to_logical_map", "logical_to_physical_map", "expert_count")
# What EPLB's README shows for its loads: 16 slots, 4 groups, 2 nodes, 8 GPUs.
EPLB_EXAMPLE = (
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ],
    [
        [
            *([12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2]),
            *([1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]),
        ],
        [
            *([13, -1], [15, 11], [8, -1], [14, -1], [9, -1], [10, 12]),
            *([2, 4], [0, -1], [6, 3], [7, -1], [1, -1], [5, -1]),
        ],
    ],
    [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]],
)


@pytest.mark.parametrize("names", [EPLB_NAMES, ("phy2log", "log2phy", "logcnt")])
@pytest.mark.parametrize("width", [2, 3, 17])
@pytest.mark.parametrize("order", ["as it is", "descending", "padding first"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_what_eplb_returns_in_any_order_width_and_dtype(
    names: tuple[str, ...], width: int, order: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    slots, physical, count = (torch.tensor(each) for each in EPLB_EXAMPLE)
    physical = torch.nn.functional.pad(physical, (0, width - 2), value=-1)
    if order != "as it is":
        physical = physical.sort(dim=2, descending=order == "descending").values
    values = [each.to(dtype).contiguous() for each in (slots, physical, count)]
    save_torch(dict(zip(names, values, strict=True)), tmp_path / "map")
    plan = read_plan(tmp_path / "map", trace=trace_of(2, 12), topology=Topology(num_nodes=2, gpus_per_node=4))
    assert plan.physical_to_logical_map.tolist() == EPLB_EXAMPLE[0]
    assert plan.method == "imported from eplb"
    assert plan.expected["strategies"]["dispatch_combine"]["messages_per_token_layer"] > 0


@pytest.mark.parametrize("dtype", np.typecodes["AllInteger"])
def test_eplb_of_numpy(dtype: str, tmp_path: Path) -> None:
    values = [np.array(each).astype(dtype) for each in EPLB_EXAMPLE]
    (tmp_path / "map").write_bytes(save(dict(zip(EPLB_NAMES, values, strict=True))))
    plan = read_plan(tmp_path / "map", trace=trace_of(2, 12), topology=Topology(gpus_per_node=8))
    assert plan.physical_to_logical_map.tolist() == EPLB_EXAMPLE[0]


@pytest.mark.parametrize("slots", [255, 256])
def test_slot_255_is_one_although_it_could_be_padding(slots: int, tmp_path: Path) -> None:
    """256 experts in as many slots fit a byte; so does padding, as long as there are fewer slots."""
    row = np.arange(slots)
    physical = row[None, :, None]
    if slots < 256:
        physical = np.concatenate([physical, np.full_like(physical, -1)], axis=2)
    values = (row[None], physical, np.ones((1, slots)))
    content = save({name: value.astype(np.uint8) for name, value in zip(EPLB_NAMES, values, strict=True)})
    (tmp_path / "map").write_bytes(content)
    plan = read_plan(tmp_path / "map", trace=trace_of(1, slots), topology=Topology(gpus_per_node=1))
    assert plan.physical_to_logical_map[0].tolist() == row.tolist()


@pytest.mark.parametrize("tensors", [False, True])
def test_what_our_rebalance_experts_returns(tensors: bool, tmp_path: Path) -> None:
    """Replicas may share a GPU, and layers without load have X beyond any expert's replicas."""
    weight: Any = np.array([[0, 0, 0, 0], [99, 1, 1, 1]])
    results = rebalance_experts(torch.tensor(weight) if tensors else weight, 12, 1, 1, 2)
    assert results[1].shape == (2, 4, 9)
    content = save({name: np.asarray(each) for name, each in zip(EPLB_NAMES, results, strict=True)})
    (tmp_path / "map").write_bytes(content)
    plan = read_plan(tmp_path / "map", trace=trace_of(2, 4), topology=Topology(gpus_per_node=2))
    assert plan.physical_to_logical_map.tolist() == results[0].tolist()
    assert plan.expected["strategies"]["dispatch_combine"]["messages_per_token_layer"] > 0
