"""Compiles the kernels of a decode step for GPUs of compute capability 9.0, which need not be there.

Run as a program, without Triton's interpreter: steps of each model below, on one rank and on simulated ones,
are run on the CPU, and every launch compiles and does nothing else. Prints the kernels compiled, one a line.
`compile_job.py one` takes one model on one rank.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from simulated_ranks import SimulatedAllToAll, job, plan_of

from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, initialise
from exflow.runtime import step_buffers
from exflow.runtime.request import Request

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
    "sinks": ROTARY
    | {"top_k": 4, "activation": "clamped-swiglu", "windows": [128], "qk_norm": "head"}
    | {"attention_bias": True}
    | {"attention_sinks": True, "gate_bias": True, "expert_bias": True},
}


class NoDevice:
    """Stand-in for the driver that Triton asks before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@torch.inference_mode()
def compile_step(shape: str, ranks: int = 1, many_rows: int = 96, nodes: int = 1) -> None:
    decoder = Decoder(ModelConfig.model_validate(BASE | SHAPES[shape]))
    initialise(decoder, torch.Generator().manual_seed(0))
    step_buffers.MANY_ROWS = many_rows
    exchange = torch.distributed.all_to_all_single = SimulatedAllToAll() if nodes > 1 else None
    plan = plan_of(decoder.config, ranks, False, nodes)
    request = Request([[1] * 200, [2]], 4)
    job(decoder, request, plan, max(1, ranks // 2), collective=exchange, relayed=nodes > 1).run(1)


def main() -> None:
    driver.set_active(NoDevice())
    launch, compiled = JITFunction.run, set()

    def only_compile(kernel: Any, *values: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.add(kernel.__name__)
        return launch(kernel, *values, grid=grid, warmup=True, **options)

    JITFunction.run = only_compile
    step_buffers.programmatic_launch = lambda device: {"PDL": True, "launch_pdl": True}
    compile_step("sinks")
    compile_step("sinks", many_rows=0)
    if sys.argv[1:] != ["one"]:
        compile_step("own")
        compile_step("width")
        compile_step("own", ranks=2)
        compile_step("sinks", ranks=4, nodes=2)
    print("\n".join(sorted(compiled)))


if __name__ == "__main__":
    main()
