"""Jobs and commands to which something happens. EXFLOW_FAULTS=N: N times as much of it; 1 is a quick look."""

import ctypes
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from exflow.model.config import ModelConfig
from exflow.placement.make_plan import place
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

PLUG = Path(__file__).with_name("plug")
REPEATS = int(os.environ.get("EXFLOW_FAULTS", "1"))
END_S = 60  # a process that has not ended by then hangs


@dataclass(frozen=True)
class Fault:
    """`do`, on rank `rank`, before the `call`-th call of `at`; see plug/sitecustomize.py."""

    at: str
    do: str
    call: int = 1
    rank: int = 1
    times: int = 1


def end_with_the_tests() -> None:
    """Tell the kernel to kill this process when the tests end, however they do."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass
class Job:
    """A command and all processes that come of it; none of them outlives the block."""

    command: list[str]
    fault: Fault | None = None
    cwd: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> Self:
        environment = os.environ | self.environment | {"OMP_NUM_THREADS": "1", "EXFLOW_JOB": self.mark}
        if self.fault is not None:
            paths = [str(PLUG), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment |= {"PYTHONPATH": ":".join(paths), "EXFLOW_FAULT": json.dumps(vars(self.fault))}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=self.cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_the_tests,
        )
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.alive():
            os.kill(process, signal.SIGKILL)
        self.process.communicate()

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; exit code, output, errors. Nothing of it may be left running."""
        out, err = self.process.communicate(timeout=END_S)
        assert not self.alive(), "processes were left over"
        return self.process.returncode, out, err

    def alive(self) -> list[int]:
        """Process ids of all that carries the job's mark and has not ended."""
        return [int(each.name) for each in Path("/proc").glob("[0-9]*") if self._is_ours(each)]

    def wake(self) -> None:
        """Continue a stopped rank once the agent has told it to end, and would kill it 30 s later."""
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            for process in self.alive():
                if _is_told_to_end(process):
                    os.kill(process, signal.SIGCONT)
                    return
            time.sleep(0.05)
        raise AssertionError("no stopped rank was told to end")

    def ranks(self, count: int, least: int = 100_000) -> list[int]:
        """The ids of the ranks, in the order of their start, once each has written `least` bytes.

        To sockets, mostly: of files a rank writes none, and a decode step is some hundred bytes.
        """
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline and self.process.poll() is None:
            ranks = [each for each in self.alive() if _rank_of(each) is not None]
            if len(ranks) == count and all(_written(each) >= least for each in ranks):
                return sorted(ranks)
            time.sleep(0.05)
        raise AssertionError(f"the ranks did not start: {self.process.poll()}")

    def _is_ours(self, process: Path) -> bool:
        try:
            ours = f"EXFLOW_JOB={self.mark}".encode() in (process / "environ").read_bytes().split(b"\0")
            return ours and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False


def _is_told_to_end(process: int) -> bool:
    """Return whether a SIGTERM is pending for the stopped process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    pending = dict(line.split(":\t", 1) for line in lines)["ShdPnd"]
    return bool(int(pending, 16) & 1 << (signal.SIGTERM - 1))


def _rank_of(process: int) -> int | None:
    for line in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
        if line.startswith(b"RANK="):
            return int(line.removeprefix(b"RANK="))
    return None


def _written(process: int) -> int:
    counters = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
    return int(counters["wchar"])


class Verbs:
    """Commands in processes that are forked from one with everything loaded."""

    VERBS = ("generate", "place", "profile", "import_trace", "balance", "report")
    PRELOAD = (
        "exflow.cli",
        "exflow.train.loop",
        *(f"exflow.commands.{each}" for each in VERBS),
        "torch._dynamo",
    )  # which optimisers load

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        assert isinstance(context, ForkServerContext)
        self.context = context
        self.context.set_forkserver_preload(list(self.PRELOAD))

    def start(
        self, folder: Path, line: str, limit: int | None = None, disk: int | None = None
    ) -> BaseProcess:
        settings = {"argv": line.split(), "folder": str(folder), "limit": limit, "disk": disk}
        arguments = {"init_globals": {"SETTINGS": settings}, "run_name": "__main__"}
        process = self.context.Process(target=runpy.run_path, args=(str(PLUG / "verb.py"),), kwargs=arguments)
        process.start()
        return process

    def run(self, folder: Path, line: str, **faults: int) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        return self.end(self.start(folder, line, **faults), folder)

    def end(self, process: BaseProcess, folder: Path) -> tuple[int, str, str]:
        process.join(END_S)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"still running after {END_S} s")
        out, err = ((folder / name).read_text() for name in ("out", "err"))
        for name in ("out", "err"):
            (folder / name).unlink()
        return process.exitcode, out, err


@pytest.fixture(scope="session")
def verbs() -> Verbs:
    return Verbs()


@pytest.fixture(scope="session")
def fault() -> type[Fault]:
    return Fault


@pytest.fixture(scope="session")
def job() -> type[Job]:
    return Job


@pytest.fixture(scope="session")
def repeats() -> int:
    return REPEATS


@pytest.fixture(scope="session")
def model(tiny_config: Callable[..., ModelConfig], tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny checkpoint with room for a run as long as you like."""
    return tiny_checkpoint(tiny_config(max_positions=200_000))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A folder with a checkpoint, a trace, a plan and a report of former times, texts and settings."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_checkpoint(), folder / "model")
    experts = np.random.default_rng(0).integers(0, 8, (600, 4, 1))
    trace = RoutingTrace.from_arrays(experts, num_experts=8, sequence=np.arange(600) // 20, model="tiny")
    trace.save(folder / "trace")
    place(trace, Topology(gpus_per_node=2)).save(folder / "plan.json")
    (folder / "report.html").write_text("an old page")
    (folder / "book.txt").write_text("It was a dark and stormy night.\n" * 400)
    np.savez(folder / "routing.npz", experts=experts, num_experts=8)
    (folder / "loads.json").write_text("[[4, 1, 1, 2], [1, 1, 1, 1]]")
    (folder / "tiny.yaml").write_text(TRAINING)
    return folder


TRAINING = """
model: {vocab_size: 280, max_positions: 32, num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2,
  num_kv_heads: 1, intermediate_size: 32, num_experts: 4}
data: {texts: [book.txt]}
training: {steps: 24, batch_size: 4, sequence_length: 24, learning_rate: 0.01, warmup_steps: 1,
  evaluate_tokens: 200}
checkpoint_steps: [0, 8, 16]
"""
