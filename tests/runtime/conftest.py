"""Jobs of several ranks, and the models and plans of their cases."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from tests.runtime.distributed_cases import Bench


def _run_jobs(script: str, jobs: dict[Path, int]) -> None:
    arguments = [str(each) for job in jobs.items() for each in job]
    command = [sys.executable, str(Path(__file__).with_name("forked_ranks.py")), script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def run_jobs() -> Callable[[str, dict[Path, int]], None]:
    """run_jobs(script, {folder: ranks}): main(folder) of a module beside this file, on every rank."""
    return _run_jobs


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    hugging_face_model: Callable[..., Any],
) -> Bench:
    folder = tmp_path_factory.mktemp("plans")
    return Bench(folder, tiny_checkpoint, tiny_config, tiny_decoder, hugging_face_model)
