"""`exflow doctor`: what is there, what is missing for what."""

import json
import sys

import pytest

from exflow import cli, doctor


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
