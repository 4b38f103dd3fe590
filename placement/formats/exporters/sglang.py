"""SGLang's --init-expert-location: JSON with a row for every hidden layer, dense ones too.

Read by `compute_initial_expert_location_metadata` in sglang/srt/eplb/expert_location.py. The object's keys
are passed on as arguments, so that any further key is a TypeError there.
"""

import json
from pathlib import Path
from shlex import quote

import numpy as np

from exflow.placement.formats.exporters.common import Usage, check_equal_experts, redundant_experts
from exflow.placement.plan.plan import Plan


def write_sglang(plan: Plan) -> bytes:
    """The bytes of the JSON file. The row of a dense layer, which nothing reads, is the engine's own default:
    slot i has expert i mod E.

    Raises InputError if layers have different numbers of experts.
    """
    check_equal_experts(plan, "SGLang")
    rows = np.tile(np.arange(plan.num_slots) % plan.num_experts, (plan.num_hidden_layers, 1))
    rows[list(plan.moe_layer_ids)] = plan.physical_to_logical_map
    lines = ",\n".join(json.dumps(row) for row in rows.tolist())
    return f'{{"physical_to_logical_map": [\n{lines}\n]}}\n'.encode()


def sglang_usage(plan: Plan, path: Path) -> Usage:
    redundant = redundant_experts(plan)
    named = f"./{path}" if str(path).startswith("-") else str(path)  # which is no option
    options = [
        f"--tp-size {plan.num_ranks} --ep-size {plan.num_ranks}",
        f"--init-expert-location {quote(named)}",
        "--moe-a2a-backend deepep",
    ]
    if redundant:
        options.append(f"--ep-num-redundant-experts {redundant}")
    return Usage(
        options=tuple(options),
        traps=(
            "With --moe-a2a-backend none (the default) redundant experts gave wrong text without any error "
            "until pull request 32962, which 0.5.23 has: use an all-to-all back end, or check accuracy.",
            "--enable-eplb moves the experts again while SGLang runs: leave it out to keep this plan.",
        ),
    )
