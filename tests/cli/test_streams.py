"""Output that stdout cannot take: characters its encoding lacks, a full disk, a closed stream."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

FULL = Path("/dev/full")
NAME = "na\xefve-模型.safetensors"


SHIPPED = Path(__file__).parents[2] / "models" / "gpt-moe-demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    trace = RoutingTrace.from_arrays(np.random.default_rng(0).integers(0, 4, (40, 2, 2)), num_experts=4)
    slots = np.array([[0, 1, 2, 3], [0, 2, 1, 3]])
    Plan.of_slots(
        slots, Topology(gpus_per_node=2), trace, method="by hand", strategy="dispatch-combine"
    ).save(folder / "plan.json")
    return folder


def exflow(folder: Path, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "exflow.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, NAME.encode()),
        pytest.param(
            {"PYTHONIOENCODING": "ascii"}, rb"na\xefve-\u6a21\u578b.safetensors", marks=pytest.mark.all
        ),
        ({"PYTHONIOENCODING": "latin-1"}, b"na\xefve-\\u6a21\\u578b.safetensors"),
        pytest.param(
            {"PYTHONIOENCODING": "cp1252"}, b"na\xefve-\\u6a21\\u578b.safetensors", marks=pytest.mark.all
        ),
    ],
)
def test_characters_that_stdout_lacks_are_escaped(
    folder: Path, environment: dict[str, str], printed: bytes
) -> None:
    done = exflow(folder, ["export", "plan.json", "--format", "eplb", "-o", NAME], **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(printed + b" for eplb; ")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["evaluate", "plan.json", "none"],
        pytest.param(["doctor", "--json"], marks=pytest.mark.all),
    ],
)
def test_a_result_that_finds_no_room(folder: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "exflow.cli", *arguments]
    with FULL.open("w") as full:
        done = subprocess.run(command, cwd=folder, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2
    if arguments[0] == "evaluate":  # which has nothing to print
        assert done.stderr.startswith(b"exflow: none: ")
    else:
        assert done.stderr == (
            b"exflow: standard output cannot be written (No space left on device); make room, or "
            b"redirect it elsewhere\n"
        )


def test_a_reader_that_goes_away(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "exflow.cli", "--help"]
    done = subprocess.run(command, cwd=folder, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("closed", ["1", pytest.param("2", marks=pytest.mark.all)])
def test_a_stream_that_is_closed(folder: Path, closed: str) -> None:
    """Output for a closed stream goes nowhere: not to the other stream, and nothing fails."""
    command = [sys.executable, "-m", "exflow.cli", "-v", "evaluate", "plan.json", "none"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], cwd=folder, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert (b"exflow: none" in done.stderr) == (closed == "1")


def test_a_prompt_file_that_can_be_read_once(folder: Path) -> None:
    """Only the process that starts the ranks reads it."""
    os.mkfifo(folder / "prompts")
    Thread(target=(folder / "prompts").write_text, args=("Rain\n",), daemon=True).start()
    generate = ["generate", str(SHIPPED), "--prompt-file", "prompts", "--max-new-tokens", "2"]
    done = exflow(folder, [*generate, "--nproc", "2", "--strategy", "coherent"])
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Rain")
