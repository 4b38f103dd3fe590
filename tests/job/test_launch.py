"""Blame for the end of a job, and the effect of signals; whole jobs are in faults/test_ranks.py."""

import signal
from signal import SIGKILL, SIGSEGV, SIGTERM

import pytest

from exflow.job.environment import Place
from exflow.job.launch import _cause_of_death, culprit, torchrun_place

ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ({2: -SIGKILL}, 2),
        ({2: -SIGKILL, 0: -SIGTERM, 1: -SIGTERM}, 2),  # the agent stopped the others
        ({1: -SIGTERM, 0: -SIGTERM, 3: 1}, 3),  # an error of its own
        ({3: 1, 1: -SIGSEGV}, 1),  # a crash is nearer to the cause than an error
        ({1: -SIGTERM, 0: -SIGTERM}, 1),  # somebody stopped 1, then the agent 0
    ],
)
def test_the_culprit(codes: dict[int, int], rank: int) -> None:
    assert culprit(codes) == rank


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({3: 1}, "the job was stopped"),  # rank 3 has told of its error
        ({1: 3, 3: 1, 0: -SIGTERM}, "the job was stopped"),
        ({1: 3, 0: -SIGKILL}, "the job was stopped"),  # rank 1 has told that rank 0 was silent
        ({3: 1, 1: -SIGSEGV}, "rank 1 of 4 died (SIGSEGV); the job was stopped"),
        ({2: 77}, "rank 2 of 4 died (exit code 77); the job was stopped"),
    ],
)
def test_what_a_rank_has_told_is_not_told_again(codes: dict[int, int], said: str) -> None:
    assert _cause_of_death(codes, num_ranks=4) == said


def test_the_place_that_torchrun_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_place() is None
    places = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    places |= {"LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert torchrun_place() == Place(rank=5, num_ranks=8, local_rank=1, ranks_per_node=4)
