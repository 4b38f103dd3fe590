"""TensorRT-LLM's MoeLoadBalancer: YAML keyed by the hidden layer's index, MoE layers alone.

Read by `MoeLoadBalancerConfig` in tensorrt_llm/llmapi/llm_args.py, which refuses further keys.
"""

import json
from pathlib import Path

from exflow.placement.formats.exporters.common import Usage
from exflow.placement.plan.plan import Plan


def write_trtllm(plan: Plan) -> bytes:
    """The bytes of the YAML file; every plan can be expressed. `layer_updates_per_iter` 0 means that nothing
    moves at run time."""
    rows = zip(plan.moe_layer_ids, plan.physical_to_logical_map.tolist(), strict=True)
    lines = [
        "initial_global_assignments:",
        *(f"  {layer}: {row}" for layer, row in rows),
        f"num_slots: {plan.num_slots}",
        "layer_updates_per_iter: 0",
    ]
    return ("\n".join(lines) + "\n").encode()


def trtllm_usage(plan: Plan, path: Path) -> Usage:
    return Usage(
        options=(
            "# in the file of --extra_llm_api_options, with --tp_size and --ep_size "
            f"{plan.num_ranks} on the command line",
            "enable_attention_dp: true",
            "moe_config:",
            "  backend: WIDEEP",
            f"  load_balancer: {json.dumps(str(path), ensure_ascii=False)}",
        ),
        traps=(
            "The file is ignored without a word if the architecture is not in moe_model_arch_list "
            "(moe_load_balancer.py) or if there is one expert-parallel rank: look for 'MoE load balancer "
            "enabled' in the log.",
            "MTP layers are asked for too, as hidden layers after the last: without rows for them, added by "
            "hand, serving with MTP ends with a KeyError.",
        ),
    )
