"""Signals such as Ctrl-C, at any moment; commands that they end are in faults/."""

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from exflow.job import outcome, signals
from exflow.job.signals import ANSWERED, Stopped, answer_signals, ctrl_c_ends_the_search, leave_signals


@pytest.fixture(autouse=True)
def restored_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be set back
    monkeypatch.setattr(signals, "_raised_at", {})
    before = {number: signal.getsignal(number) for number in ANSWERED}
    yield
    leave_signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "stopped by SIGTERM"),
        (signal.SIGHUP, "stopped by SIGHUP"),
    ],
)
def test_a_signal_raises_stopped(number: signal.Signals, words: str) -> None:
    answer_signals()
    with pytest.raises(Stopped, match=words) as caught:
        send(number)
    assert caught.value.signal == number


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    answer_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_rank_goes_without_a_word_and_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    told: list[bool] = []
    monkeypatch.setattr(signals, "_end_with_parent", lambda: told.append(True))
    answer_signals()
    assert [signal.getsignal(number) for number in ANSWERED] == [signal.SIG_DFL] * 3
    assert told == [True]


def test_pressed_twice_does_not_disturb_the_tidying_up() -> None:
    answer_signals()
    with pytest.raises(Stopped):
        send()
    send()


def test_what_was_not_heard_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_AGAIN_S", 0.0)
    monkeypatch.setattr(signals, "_UNHEARD_S", 0.05)
    answer_signals()
    with pytest.raises(Stopped):
        with suppress(BaseException):  # as some libraries have it
            send()
        time.sleep(2)


def test_an_exception_that_python_drops_is_heard() -> None:
    class Dropping:
        def __del__(self) -> None:
            send()

    answer_signals()
    with pytest.raises(Stopped):
        Dropping()
        time.sleep(2)
    with pytest.raises(Stopped), ctrl_c_ends_the_search():
        Dropping()
        time.sleep(2)


def test_an_import_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception during torch's import would reach C++ code that aborts."""
    (tmp_path / "sends_to_itself.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    answer_signals()
    module = importlib.import_module("sends_to_itself")
    assert module.whole
    with pytest.raises(Stopped):
        time.sleep(2)


def test_no_signal_is_answered_after_the_work() -> None:
    answer_signals()
    leave_signals()
    assert [signal.getsignal(number) for number in ANSWERED] == [signal.SIG_DFL] * 3


def test_an_error_after_a_signal_is_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may turn the exception of a signal into a ValueError while it looks at a storage."""

    def fails() -> None:
        raise ValueError("could not determine the shape")

    monkeypatch.setattr(signals, "_raised_at", {})
    with pytest.raises(ValueError, match="shape"):
        outcome._do(fails)
    signals._raised_at[signal.SIGTERM] = 1.0
    with pytest.raises(signals.Stopped, match="stopped by SIGTERM"):
        outcome._do(fails)
