"""vllm-ascend's expert map: JSON, MoE layers in order, the experts of each device.

Read by `expert_file_to_tensor` in vllm_ascend/eplb/core/eplb_utils.py.
"""

import json
from pathlib import Path
from shlex import quote

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.formats.exporters.common import Usage, check_equal_experts
from exflow.placement.plan.plan import Plan


def write_vllm_ascend(plan: Plan) -> bytes:
    """The bytes of the JSON file. Raises InputError if layers have different numbers of experts, or a rank
    holds an expert twice."""
    check_equal_experts(plan, "vllm-ascend")
    devices = plan.physical_to_logical_map.reshape(plan.num_layers, plan.num_ranks, plan.slots_per_rank)
    _check_none_twice(devices)
    lines = ",\n".join(_layer(index, layer.tolist()) for index, layer in enumerate(devices))
    return f'{{"moe_layer_count": {plan.num_layers}, "layer_list": [\n{lines}\n]}}\n'.encode()


def vllm_ascend_usage(plan: Plan, path: Path) -> Usage:
    config = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
    return Usage(
        options=("--enable-expert-parallel", f"--additional-config {quote(config)}"),
        traps=(
            "Model runner V1 alone reads static maps, V2 refuses them: set VLLM_USE_V2_MODEL_RUNNER=0.",
            f"The number of expert-parallel ranks must be {plan.num_ranks}; it is not checked.",
            "On Atlas A2 there can be no redundant experts.",
        ),
    )


def _layer(index: int, devices: list[list[int]]) -> str:
    placed = [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(devices)]
    return json.dumps({"layer_id": index, "device_count": len(devices), "device_list": placed})


def _check_none_twice(devices: npt.NDArray[np.integer]) -> None:
    """Raise InputError if a device in `devices` [L, G, S] holds an expert twice. The engine inverts a
    device's list: one of two slots with one expert would be lost, and the slots of later devices miscounted.
    """
    ordered = np.sort(devices, axis=2)
    twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
    if len(twice):
        layer, rank, slot = twice[0].tolist()
        raise InputError(
            f"MoE layer {layer}: rank {rank} holds expert {ordered[layer, rank, slot]} twice, which "
            "vllm-ascend cannot; place again with fewer redundant experts"
        )
