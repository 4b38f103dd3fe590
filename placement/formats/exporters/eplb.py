"""The three tensors of DeepSeek's EPLB as a safetensors file, for programs that call it.

`physical_to_logical_map` [L, P], `logical_to_physical_map` [L, E, X] padded with -1, `expert_count` [L, E],
all int64: what `rebalance_experts` returns.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from exflow.placement.formats.exporters.common import Usage, check_equal_experts
from exflow.placement.plan.logical_maps import logical_maps
from exflow.placement.plan.plan import Plan


def write_eplb(plan: Plan) -> bytes:
    """The bytes of the safetensors file. Raises InputError if layers have different numbers of experts."""
    check_equal_experts(plan, "EPLB")
    slots = np.ascontiguousarray(plan.physical_to_logical_map, dtype=np.int64)
    logical_to_physical, count = logical_maps(slots, plan.num_experts)
    tensors = {
        "physical_to_logical_map": slots,
        "logical_to_physical_map": logical_to_physical,
        "expert_count": count,
    }
    return bytes(save(tensors))


def eplb_usage(plan: Plan, path: Path) -> Usage:
    return Usage(
        options=(
            f"tensors = safetensors.torch.load_file({str(path)!r})",
            "# its three tensors are what rebalance_experts returns, under the names of EPLB",
        ),
        traps=(
            f"Slots are for {plan.num_ranks} GPUs of {plan.slots_per_rank}; rows are MoE layers, not hidden "
            "layers.",
        ),
    )
