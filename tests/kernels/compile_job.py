"""Compiles the kernels of a decode step for GPUs of compute capability 9.0, which need not be there.

Run as a program, without Triton's interpreter: a step of each model shape below is run on the CPU, and every
launch compiles and does nothing else. Prints the kernels compiled, one a line.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from exflow import decode_step
from exflow.captured import Capture
from exflow.config import ModelConfig
from exflow.deploy import contiguous_plan
from exflow.distributed import Cluster
from exflow.moe import PlanTables
from exflow.placement.topology import Topology
from exflow.random_weights import RandomWeights, random_decoder
from exflow.sampling import GREEDY

CPU = torch.device("cpu")
BASE = {
    "vocab_size": 320,
    "max_positions": 512,
    "num_hidden_layers": 1,
    "hidden_size": 512,
    "num_attention_heads": 16,
    "num_kv_heads": 4,
    "head_dim": 64,
    "intermediate_size": 256,
    "num_experts": 8,
}
ROTARY = {"norm": "rmsnorm", "rope": {"theta": 1e4}, "activation": "swiglu"}
SHAPES: dict[str, dict[str, Any]] = {
    "own": {},
    "width": ROTARY | {"top_k": 2, "qk_norm": "width", "qkv_clip": 8.0, "gate_softmax": "all"},
    "head": ROTARY | {"top_k": 4, "qk_norm": "head"},
    "sinks": ROTARY
    | {"top_k": 4, "activation": "clamped-swiglu", "windows": [128], "attention_bias": True}
    | {"attention_sinks": True, "gate_bias": True, "expert_bias": True},
}


class NoDevice:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_step(config: ModelConfig, many_rows: int) -> None:
    experts = [list(range(config.num_experts))] * len(config.moe_layer_ids)
    decoder = random_decoder(RandomWeights(config), CPU, torch.bfloat16, experts)
    tables = PlanTables.of(contiguous_plan(config, Topology(gpus_per_node=1)), CPU)
    decode_step.MANY_ROWS = many_rows
    capture = Capture(decoder, tables, Cluster(0, 1, 1, CPU), 1, False, "one-sided")
    with torch.inference_mode():
        capture.make(16, 256, GREEDY, (1, 2)).run()


def main() -> None:
    driver.set_active(NoDevice())
    launch, compiled = JITFunction.run, set()

    def only_compile(kernel: Any, *values: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.add(kernel.__name__)
        return launch(kernel, *values, grid=grid, warmup=True, **options)

    JITFunction.run = only_compile
    decode_step._programmatic_launch = lambda device: {"PDL": True, "launch_pdl": True}
    for changes in SHAPES.values():
        compile_step(ModelConfig.model_validate(BASE | changes), decode_step.MANY_ROWS)
    compile_step(ModelConfig.model_validate(BASE | SHAPES["sinks"]), 0)
    print("\n".join(sorted(compiled)))


if __name__ == "__main__":
    main()
