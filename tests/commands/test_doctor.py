"""`exflow doctor`: what is there, what is missing for what."""

import json
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

from exflow.commands import doctor
from exflow.placement import compiled

Run = Callable[[str], tuple[int, str, str]]


def test_what_is_installed_is_found(command_line: Run) -> None:
    import torch

    code, out, _ = command_line("doctor --json")
    told = json.loads(out)
    assert code == 0
    assert told["found"]["torch"] == torch.__version__
    assert set(doctor.REQUIRED) <= set(told["found"])
    assert ("GPUs" in told["found"]) == torch.cuda.is_available()
    assert told["found"]["gloo"] == "yes"


def test_what_is_missing_is_told_with_its_use(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    there = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: "" if name in ("transformers", "highspy") else there(name)
    )
    code, out, _ = command_line("doctor")
    assert code == 1  # highspy is required
    assert "missing: highspy, for everything: pip install highspy\n" in out
    assert "missing: transformers, for exflow profile hf:FOLDER, exflow.record: pip install 'exflow[t" in out


def test_where_compiled_code_is_kept_is_told(
    command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert json.loads(command_line("doctor --json")[1])["found"]["compiled code"].startswith(str(tmp_path))

    def nowhere(function: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compiled, "FunctionCache", nowhere)
    missing = json.loads(command_line("doctor --json")[1])["missing"]["compiled code"]
    assert missing["needed_for"] == "a quick start of place and report"
    assert "NUMBA_CACHE_DIR" in missing["remedy"]
