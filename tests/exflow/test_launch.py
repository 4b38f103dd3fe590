"""Who is blamed for the end of a job, and what the signals do; jobs themselves are in test_faults.py."""

import os
import signal
from collections.abc import Iterator
from signal import SIGINT, SIGKILL, SIGSEGV, SIGTERM

import pytest

from exflow.launch import LOST_CONTACT, Place, Stopped, answer_signals, culprit, torchrun_place

ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ({2: -SIGKILL}, 2),
        ({2: -SIGKILL, 0: -SIGTERM, 1: -SIGTERM}, 2),  # the agent stopped the others
        ({0: LOST_CONTACT, 1: LOST_CONTACT, 2: -SIGKILL, 3: -SIGTERM}, 2),
        ({0: LOST_CONTACT, 3: 1, 1: -SIGTERM}, 3),  # an error of its own
        ({3: 1, 1: -SIGSEGV}, 1),  # a crash is nearer to the cause than an error
        ({1: -SIGTERM, 0: -SIGTERM, 2: LOST_CONTACT}, 1),  # somebody stopped 1, then the agent 0
        ({1: LOST_CONTACT, 2: LOST_CONTACT}, 1),
    ],
)
def test_the_culprit(codes: dict[int, int], rank: int) -> None:
    assert culprit(codes) == rank


def test_the_place_that_torchrun_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_place() is None
    places = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    for name, value in (places | {"LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    assert torchrun_place() == Place(rank=5, num_ranks=8, local_rank=1, ranks_per_node=4)


@pytest.fixture
def restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ANSWERED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "words"),
    [(SIGINT, "interrupted"), (SIGTERM, "stopped by SIGTERM"), (signal.SIGHUP, "stopped by SIGHUP")],
)
def test_a_signal_raises_stopped(restored_signals: None, number: signal.Signals, words: str) -> None:
    answer_signals()
    with pytest.raises(Stopped, match=words) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.signal == number


def test_an_ignored_signal_stays_ignored(restored_signals: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    answer_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_rank_goes_without_a_word(restored_signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    answer_signals()
    assert [signal.getsignal(number) for number in ANSWERED] == [signal.SIG_DFL] * 3
