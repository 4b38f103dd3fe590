"""A rank that dies, stops or is slow: the job ends soon, says why, and leaves no process behind."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exflow.errors import InputError
from exflow.job.cluster import join_cluster
from tests.one_process import tokens_of_one_process

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PROMPTS = ("Rain", "Wind and", "Sun", "Fog")
MOMENTS = {
    "loading": ("exflow.model.checkpoint:Checkpoint.decoder", 1),
    "prompts": ("exflow.runtime.kv_cache:PrefillAttention.attend", 2),
    "decoding": ("exflow.runtime.kv_cache:DecodeAttention.attend", 9),
    "gather": ("exflow.runtime.kv_cache:KVSharing.finish", 9),  # which then is under way
}
OUT_OF_MEMORY = (
    "exflow: rank 1: out of memory (1152921504606846976 bytes more were asked for); give it less to do at a "
    "time, or more ranks, or more memory\n"
)
DEATHS = {
    "SIGKILL": "exflow: rank 1 of {} died (SIGKILL); the job was stopped; if nobody killed it, memory ran "
    "out (see dmesg)\n",
    "SIGTERM": "exflow: rank 1 of {} died (SIGTERM); the job was stopped\n",
    "out of memory": f"{OUT_OF_MEMORY}exflow: the job was stopped\n",
}
FEW = [
    ("decoding", "out of memory", 2),
    ("gather", "SIGKILL", 2),
    pytest.param("loading", "SIGKILL", 4, marks=pytest.mark.all),
    pytest.param("prompts", "SIGTERM", 4, marks=pytest.mark.all),
]


@pytest.fixture
def generate(model: Path, job: Any) -> Callable[..., Any]:
    """generate(*options, fault=None): a job of ranks, long enough to be disturbed."""

    def start(*options: str, model: Path = model, fault: Any = None, nproc: int = 2) -> Any:
        command = [sys.executable, "-m", "exflow.cli", "generate", str(model), "--ignore-end"]
        command += ["--strategy", "coherent"]
        for prompt in PROMPTS:
            command += ["--prompt", prompt]
        return job([*command, "--nproc", str(nproc), *(options or ["--max-new-tokens", "190000"])], fault)

    return start


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "death" in metafunc.fixturenames:
        many = int(os.environ.get("EXFLOW_FAULTS", "1")) > 1
        every = list(product(MOMENTS, DEATHS, [4]))
        metafunc.parametrize(("moment", "death", "ranks"), every if many else FEW)


def test_a_rank_that_dies(
    generate: Callable[..., Any], fault: Any, moment: str, death: str, ranks: int
) -> None:
    at, call = MOMENTS[moment]
    with generate(fault=fault(at, death, call), nproc=ranks) as job:
        assert job.end() == (1, "", DEATHS[death].format(ranks))


def test_ranks_do_not_outlive_a_killed_launcher(generate: Callable[..., Any]) -> None:
    with generate() as job:
        job.ranks(2)
        job.process.kill()
        job.process.wait()
        deadline = time.monotonic() + 5
        while job.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not job.alive()


def test_ctrl_c(generate: Callable[..., Any]) -> None:
    with generate() as job:
        job.ranks(2)
        job.process.send_signal(signal.SIGINT)
        assert job.end() == (130, "", "exflow: interrupted\n")


def test_a_rank_that_stops(generate: Callable[..., Any], fault: Any) -> None:
    """A rank stops in a group's gather, which has a timeout of its own."""
    stops = fault(MOMENTS["gather"][0], "SIGSTOP", call=9)
    with generate("--patience", "3", "--max-new-tokens", "190000", fault=stops) as job:
        first = job.process.stderr.readline()
        assert first.startswith("exflow: no sign of life from rank 1 of 2 for 3 s in a ")
        assert first.endswith(", decode step 2; if it was only slow, give more --patience\n")
        job.wake()
        assert job.end() == (1, "", "exflow: the job was stopped\n")


def test_a_rank_that_never_comes(generate: Callable[..., Any], fault: Any) -> None:
    stops = fault("exflow.job.cluster:join_cluster", "SIGSTOP")
    with generate("--patience", "1", fault=stops) as job:
        assert job.process.stderr.readline() == (
            "exflow: rank 1 of 2 did not come within 1 s; start torchrun alike on every node, or give more "
            "--patience\n"
        )
        job.wake()
        assert job.end() == (1, "", "exflow: the job was stopped\n")


def test_a_slow_rank_is_waited_for(generate: Callable[..., Any], fault: Any, model: Path) -> None:
    """Longer than patience in all, never in one place."""
    slow = fault(MOMENTS["decoding"][0], "sleep 1 s", call=9, times=5)
    with generate("--patience", "4", "--max-new-tokens", "6", "--json", fault=slow) as job:
        code, out, err = job.end()
    assert (code, err) == (0, "")
    assert json.loads(out)["tokens"] == tokens_of_one_process(model, list(PROMPTS), 6)


@pytest.mark.all
def test_a_fault_that_one_rank_finds_is_told_once(
    generate: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    """Expert 7 lives on rank 1 alone, which alone sees the NaN."""
    broken = tiny_checkpoint()
    weights = load_file(broken / "model.safetensors")
    weights["blocks.1.mlp.experts.w_in"][7, 0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors")
    with generate("--max-new-tokens", "2", model=broken) as job:
        code, out, err = job.end()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "blocks.1.mlp.experts.w_in" in err
    assert "NaN" in err


def test_a_wrong_result_of_all_ranks_is_told_once(
    generate: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    """Weights are finite, and what every rank computes overflows."""
    huge = tiny_checkpoint()
    weights = load_file(huge / "model.safetensors")
    for name in ("w_in", "w_out"):
        weights[f"blocks.1.mlp.experts.{name}"] *= 1e30
    save_file(weights, huge / "model.safetensors")
    with generate("--max-new-tokens", "2", model=huge) as job:
        code, out, err = job.end()
    assert (code, out) == (1, ""), err
    told = r"exflow: sequence \d, step 0 \(.*\): the logits hold NaN or infinite values; .*\n"
    assert re.fullmatch(f"{told}exflow: the job was stopped\n", err), err


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in (place | {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable9")
    with (
        pytest.raises(InputError, match="cable9: no such network interface"),
        join_cluster("cpu"),
    ):
        pass
