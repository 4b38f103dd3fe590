"""Jobs of several ranks."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def _run_jobs(script: str, jobs: dict[Path, int]) -> None:
    arguments = [str(each) for job in jobs.items() for each in job]
    command = [sys.executable, str(Path(__file__).with_name("forked_ranks.py")), script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def run_jobs() -> Callable[[str, dict[Path, int]], None]:
    """run_jobs(script, {folder: ranks}): main(folder) of a module beside this file, on every rank."""
    return _run_jobs
