"""Who is blamed for the end of a job, and what the signals do; jobs themselves are in test_faults.py."""

import signal
from signal import SIGKILL, SIGSEGV, SIGTERM

import pytest

from exflow.launch import Place, culprit, torchrun_place

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


def test_the_place_that_torchrun_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_place() is None
    places = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    for name, value in (places | {"LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    assert torchrun_place() == Place(rank=5, num_ranks=8, local_rank=1, ranks_per_node=4)
