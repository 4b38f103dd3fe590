"""`exflow place` interrupted by Ctrl-C: it writes the best plan so far, soon."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from exflow.placement.plan.plan import Plan
from exflow.profiling.trace import RoutingTrace
from tests.commands.test_place import MESSAGES

_INTERRUPTED = """
import os, signal, sys, time
from exflow.cli import main, place

class Line(place.TimedWork):
    told = None
    def tell(self, detail):
        if Line.told is None and detail.startswith("objective"):
            Line.told = time.monotonic()
            os.killpg(0, signal.SIGINT)

place.TimedWork = Line
try:
    main()
finally:
    with open(os.environ["SECONDS"], "w") as file:
        file.write(str(time.monotonic() - Line.told))
"""


@dataclass
class Interrupted:
    code: int
    stdout: str
    stderr: str
    seconds: float  # from Ctrl-C to the end
    folder: Path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A search that has its first result and seconds to go, over an older plan, when Ctrl-C comes."""
    folder = tmp_path_factory.mktemp("interrupted")
    experts = np.random.default_rng(0).integers(0, 64, (500, 24, 2))
    RoutingTrace.from_arrays(experts, num_experts=64).save(folder / "trace")
    (folder / "plan.json").write_text("an older plan")
    arguments = ["place", "trace", "--gpus", "8", "-o", "plan.json", "--time-limit", "4", *MESSAGES]
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, *arguments],
        cwd=folder,
        env=os.environ | {"SECONDS": str(folder / "seconds")},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
    )
    seconds = float((folder / "seconds").read_text())
    return Interrupted(done.returncode, done.stdout, done.stderr, seconds, folder)


@pytest.mark.slow
def test_ctrl_c_writes_the_best_so_far(interrupted: Interrupted) -> None:
    assert interrupted.code == 0
    assert "messages coherent" in interrupted.stdout
    assert (
        interrupted.stderr.startswith("exflow: The trace has 500 tokens")
        and interrupted.stderr.count("\n") == 1
    )
    assert Plan.load(interrupted.folder / "plan.json").num_ranks == 8
    assert {path.name for path in interrupted.folder.iterdir()} == {"plan.json", "seconds", "trace"}


@pytest.mark.slow
def test_ctrl_c_ends_the_search_soon(interrupted: Interrupted) -> None:
    assert interrupted.seconds < 1
