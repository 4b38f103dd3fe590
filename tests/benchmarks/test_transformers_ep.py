"""benchmarks/decode/transformers_ep.py: on two ranks the baseline computes what one process does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exflow.job.cluster import Cluster
from exflow.model.config import ModelConfig

pytest.importorskip("transformers")
pytestmark = [pytest.mark.all, pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
MODULE = "benchmarks.decode.transformers_ep"
BATCH, CONTEXT = 6, 16


def test_two_ranks_compute_what_one_process_does(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    shape = tiny_config(name="gpt-oss-20b", top_k=2, activation="swiglu", head_dim=16, num_hidden_layers=24)
    (tmp_path / "config.json").write_text(shape.model_dump_json())
    job = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", MODULE]
    job += [str(tmp_path), "--how", "captured", "--how", "eager", "-o", str(tmp_path / "found.json")]
    job += ["--dtype", "float32", "--batch", str(BATCH), "--context", str(CONTEXT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(job, capture_output=True, text=True, timeout=150, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())

    # what cannot be done (here there is no GPU) says why, and the rest goes on
    failed, rows = found["rows"][:2], found["rows"][2:]
    assert [row["how"] for row in failed] == ["captured"] * 2
    assert all("Error: " in row["stopped"] for row in failed)
    assert [(row["code"], row["how"]) for row in rows] == [("mixtral", "eager"), ("gpt_oss", "eager")]
    for row in rows:
        assert row["experts_here"] == shape.num_experts // 2
        assert row["logits"] == pytest.approx(logits_of_one_process(shape, row["code"]), abs=1e-5)
        few, many = row["measured_us"]["2"], row["measured_us"]["6"]
        assert row["step_us"] == pytest.approx(few + 22 * (many - few) / 4)


def logits_of_one_process(shape: ModelConfig, code: str) -> Any:
    from benchmarks.decode import transformers_ep, transformers_model, transformers_step

    bench = transformers_model.Bench.of(Cluster(0, 1, 1, torch.device("cpu")), torch.float32, CONTEXT)
    model = transformers_model.transformers_model(bench, shape, code, transformers_ep.DEPTHS[-1])
    found = transformers_step.transformers_step(bench, model, "eager", BATCH)
    assert found["experts_here"] == shape.num_experts
    return found["logits"]
