"""The kernels of a decode step compile for the GPUs that they are made for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ON_ONE_RANK = {
    "activate_kernel",
    "advance_kernel",
    "combine_kernel",
    "decode_attention_kernel",
    "expert_down_kernel",
    "expert_up_kernel",
    "gate_and_dispatch_kernel",
    "merge_splits_kernel",
    "permute_kernel",
    "prepare_heads_kernel",
    "receive_kernel",
    "send_partials_kernel",
    "unpermute_kernel",
}
BETWEEN_NODES = {"relay_sums_kernel", "relay_tokens_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "kernels"),
    [
        (["one"], ON_ONE_RANK),
        pytest.param([], ON_ONE_RANK | BETWEEN_NODES, marks=pytest.mark.all),
    ],
    ids=["one model", "every model, and several nodes"],
)
def test_they_compile_for_gpus_of_capability_9(models: list[str], kernels: set[str], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_job.py")), *models],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},  # as on a CPU
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == sorted(kernels)
