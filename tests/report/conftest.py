"""The command, in a folder of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.report.pages import Run


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command_line: Callable[[str], tuple[int, str, str]]
) -> Run:
    """run("report trace ...", code=0) in a folder of its own; what it printed on stdout, or on stderr."""
    monkeypatch.chdir(tmp_path)

    def command(line: str, code: int = 0) -> str:
        ended, out, err = command_line(line)
        assert ended == code, err
        return err if code else out

    return command
