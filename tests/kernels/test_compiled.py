"""The kernels of a decode step compile for the GPUs that they are made for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = [
    "activate",
    "advance",
    "decode_attention",
    "expert_down",
    "expert_up",
    "gate_and_put",
    "line_up",
    "merge_splits",
    "pass_on",
    "prepare_heads",
    "put_back",
    "put_partials",
    "receive",
    "send_sums",
    "settle",
]


@pytest.mark.slow
def test_they_compile_for_gpus_of_capability_9(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_job.py"))],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},  # as on a CPU
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == KERNELS
