"""`exflow doctor`: what is there, what is missing for what."""

import json
import sys
from pathlib import Path

import numba
import pytest

from exflow import cli
from exflow.commands import doctor
from exflow.placement import compiled


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(cli, "answer_signals", lambda: None)
        monkeypatch.setattr(sys, "argv", ["exflow", "doctor", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    return run


def test_what_is_installed_is_found(run) -> None:  # type: ignore[no-untyped-def]
    import torch

    code, out = run("--json")
    told = json.loads(out)
    assert code == 0
    assert told["found"]["torch"] == torch.__version__
    assert set(doctor.REQUIRED) <= set(told["found"])
    assert ("GPUs" in told["found"]) == torch.cuda.is_available()
    assert told["found"]["gloo"] == "yes"


def test_what_is_missing_is_told_with_its_use(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    there = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: "" if name in ("transformers", "highspy") else there(name)
    )
    code, out = run()
    assert code == 1  # highspy is required
    assert "missing: highspy, for everything: pip install highspy\n" in out
    assert "missing: transformers, for exflow profile hf:FOLDER, exflow.record: pip install 'exflow[t" in out


def test_where_compiled_code_is_kept_is_told(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert json.loads(run("--json")[1])["found"]["compiled code"].startswith(str(tmp_path))

    def nowhere(function: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compiled, "FunctionCache", nowhere)
    missing = json.loads(run("--json")[1])["missing"]["compiled code"]
    assert missing["needed_for"] == "a quick start of place and report"
    assert "NUMBA_CACHE_DIR" in missing["remedy"]
