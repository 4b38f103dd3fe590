"""A command that is ended at a random moment says so, leaves whole files, and can be gone on with."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exflow.model.checkpoint import Checkpoint
from exflow.placement.plan.plan import Plan
from exflow.profiling.trace import RoutingTrace

pytestmark = pytest.mark.slow

ENDS = {  # and what the program says to it
    signal.SIGINT: "exflow: interrupted\n",
    signal.SIGTERM: "exflow: stopped by SIGTERM\n",
    signal.SIGKILL: "",
}
COMMANDS = {
    "profile": "profile model --text book.txt --tokens 12000 -o trace",
    "place": "place trace --gpus 4 --method search --time-limit 1 -o plan.json",
    "train": "train tiny.yaml -o run",
    "generate": "generate model --prompt Rain --max-new-tokens 50 --ignore-end --trace trace",
    "report": "report trace plan.json -o report.html",
}


@pytest.fixture
def work(inputs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """work(name): a new copy of the inputs."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(inputs, tmp_path / name))

    return copy


def is_answered(process: int) -> bool:
    """Return whether the command has installed its signal handlers."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    caught = dict(line.split(":\t", 1) for line in lines)["SigCgt"]
    return bool(int(caught, 16) & 1 << (signal.SIGTERM - 1))


def begun(verbs: Any, folder: Path, line: str) -> Any:
    process = verbs.start(folder, line)
    while not is_answered(process.pid):
        time.sleep(0.001)
    return process


def temporaries(folder: Path) -> list[Path]:
    """Return the temporary files that writers make before a file is whole."""
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def check_whole(folder: Path) -> None:
    """Whatever is there can be read: the old file or the new one."""
    RoutingTrace.load(folder / "trace")
    Plan.load(folder / "plan.json")
    assert (folder / "report.html").read_text().startswith(("an old page", "<!DOCTYPE html>"))
    for checkpoint in folder.glob("run/step-*"):
        Checkpoint.open(checkpoint).decoder(torch.device("cpu"), torch.float32)


def go_on(verb: str, verbs: Any, folder: Path) -> None:
    """Give the command again, with --resume where there is something to go on with."""
    if verb == "profile":
        resume = '"source"' in (folder / "trace" / "index.json").read_text()  # else it is still the old one
    else:
        resume = (folder / "run" / "state" / "latest.json").is_file()
    assert verbs.run(folder, COMMANDS[verb] + " --resume" * resume)[0] == 0


def result(folder: Path) -> object:
    """Return the result of the whole command, for comparison."""
    run = {path.name: path.read_bytes() for path in folder.glob("run/step-000024/*")}
    return RoutingTrace.load(folder / "trace").digest(), run


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=() if verb == "profile" else pytest.mark.all) for verb in COMMANDS]
)
def test_ended_at_any_moment(verb: str, verbs: Any, work: Callable[[str], Path], repeats: int) -> None:
    line, whole = COMMANDS[verb], work("undisturbed")
    process, began = begun(verbs, whole, line), time.monotonic()
    assert verbs.end(process, whole)[0] == 0
    seconds = time.monotonic() - began
    moments = random.Random(verb)
    for number, (kind, said) in enumerate(list(ENDS.items()) * repeats):
        folder, moment = work(f"disturbed{number}"), moments.uniform(0, seconds)
        process = begun(verbs, folder, line)
        process.join(moment)
        if process.exitcode is None:
            os.kill(process.pid, kind)
        code, _, err = verbs.end(process, folder)
        at = f"{kind.name} after {moment:.3f} of {seconds:.3f} s: {code} {err}"
        assert code == 0 or (code in (128 + kind, -kind) and err.endswith(said)), at
        assert "Traceback" not in err, at
        assert kind == signal.SIGKILL or not temporaries(folder), at
        check_whole(folder)
        if verb in ("profile", "train"):
            go_on(verb, verbs, folder)
            assert result(folder) == result(whole), at
