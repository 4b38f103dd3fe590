"""A rank that dies ends the job, soon, with a clear word; Ctrl-C leaves nothing running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exflow.config import ModelConfig

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SECONDS_TO_END = 30


@contextmanager
def job(model: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`exflow generate` on two ranks, long enough to be disturbed."""
    command = [sys.executable, "-m", "exflow.cli", "generate", str(model), "--prompt", "Rain", "--nproc", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--ignore-end", *more],
        stdout=-1,
        stderr=-1,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                ranks = children_of(process)  # each in a session of its own, so that they would live on
                for each in (process.pid, *ranks):
                    os.kill(each, signal.SIGKILL)


def children_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that decode by now: children of `process` that have sent each other rows."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        busy = [child for child in children_of(process) if bytes_written(child) > 100_000]
        if len(busy) == 2:
            return busy
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def bytes_written(process: int) -> int:
    """To sockets, mostly: of files a rank writes none. A step is some hundred bytes."""
    counters = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
    return int(counters["wchar"])


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., ModelConfig], tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tiny_config(max_positions=200_000))


def test_a_killed_rank_ends_the_job(model: Path) -> None:
    with job(model, "--max-new-tokens", "190000") as process:
        ranks = ranks_of(process)
        os.kill(ranks[1], signal.SIGKILL)
        out, err = process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode == 1
    assert out == ""
    assert "of 2 died (SIGKILL); the job was stopped" in err
    assert "Traceback" not in err
    assert not any(alive(rank) for rank in ranks)


def test_ctrl_c_ends_the_job(model: Path) -> None:
    with job(model, "--max-new-tokens", "190000") as process:
        ranks = ranks_of(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode != 0
    assert out == ""
    assert err.strip() == "exflow: interrupted"
    assert not any(alive(rank) for rank in ranks)


def test_a_fault_that_one_rank_finds_is_told_once(tiny_checkpoint: Callable[..., Path]) -> None:
    """Expert 7 lives on rank 1 alone, which alone sees the NaN."""
    broken = tiny_checkpoint()
    weights = load_file(broken / "model.safetensors")
    weights["blocks.1.mlp.experts.w_in"][7, 0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors")
    with job(broken, "--max-new-tokens", "2") as process:
        out, err = process.communicate(timeout=90)
    assert process.returncode == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "blocks.1.mlp.experts.w_in" in err
    assert "NaN" in err
