"""The map that proposals for vLLM read: a JSON list, for each MoE layer the expert in each slot.

As in `initial_expert_map_path` of pull request 49572. No release reads a map.
"""

import json
from pathlib import Path
from shlex import quote

from exflow.placement.formats.exporters.common import Usage, check_equal_experts, redundant_experts
from exflow.placement.plan.plan import Plan


def write_vllm(plan: Plan) -> bytes:
    """The bytes of the JSON file. Raises InputError if layers have different numbers of experts."""
    check_equal_experts(plan, "vLLM")
    lines = ",\n".join(json.dumps(row) for row in plan.physical_to_logical_map.tolist())
    return f"[\n{lines}\n]\n".encode()


def vllm_usage(plan: Plan, path: Path) -> Usage:
    config = {"num_redundant_experts": redundant_experts(plan), "initial_expert_map_path": str(path)}
    return Usage(
        options=("--enable-expert-parallel", "--enable-eplb", f"--eplb-config {quote(json.dumps(config))}"),
        traps=(
            "No released vLLM reads a map (0.33.0 does not): this is for a build with pull request 49572, "
            "which is open. Other proposals (34811, 53022, 41141) take other files.",
            f"The number of expert-parallel ranks must be {plan.num_ranks}: the file does not say it.",
            "EPLB goes on to move experts by load; a large step_interval keeps the plan longer.",
        ),
    )
