"""Start the ranks of a job on this machine, and end them all, with a clear word, when one of them dies."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

BAD_INPUT = 2  # exit code where the user's input is at fault
LOST_CONTACT = 3  # exit code of a rank that found another one gone


@dataclass(frozen=True)
class Place:
    """Where torchrun put this process: rank of num_ranks, with ranks_per_node on each node."""

    rank: int
    num_ranks: int
    local_rank: int
    ranks_per_node: int


def torchrun_place() -> Place | None:
    """This process's place in the job of a torchrun around it; None where there is none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Place(*(int(os.environ[name]) for name in names))


class RankDied(RuntimeError):
    """A rank of the job ended with an error; the others were stopped."""


class LostContact(RuntimeError):
    """Another rank went away in the middle of an exchange; whoever started the ranks knows why."""


class Stopped(BaseException):
    """A signal told the program to end. No KeyboardInterrupt: typer would answer that one itself."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__("interrupted" if number == signal.SIGINT else f"stopped by {self.signal.name}")


def answer_signals() -> None:
    """Let Ctrl-C and its like raise Stopped, so that whoever writes a file can tidy up.

    A rank ends at once and without a word: the process that started it says one.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop if torchrun_place() is None else signal.SIG_DFL)


@contextmanager
def ctrl_c_ends_the_search() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, by which a search ends and gives the best so far."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:  # outside a search: nothing to give
        raise Stopped(signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


def run_ranks(arguments: list[str], num_ranks: int) -> None:
    """Run `exflow ARGUMENTS` as `num_ranks` ranks under torchrun's agent; returns when all have ended well.

    Standard output and error of the ranks are this process's own. Raises RankDied if a rank ended otherwise;
    exits with code BAD_INPUT if the ranks found the input at fault (the first of them has printed why). No
    rank outlives the call, however it ends.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # RankDied says it in one line
    cores_per_rank = max(1, (os.cpu_count() or 1) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores_per_rank))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGQUIT",  # and not those of answer_signals
    )
    try:
        elastic_launch(config, sys.executable)("-m", "exflow.cli", *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if BAD_INPUT in codes.values():
            sys.exit(BAD_INPUT)
        rank = culprit(codes)
        how = signal.Signals(-codes[rank]).name if codes[rank] < 0 else f"exit code {codes[rank]}"
        raise RankDied(f"rank {rank} of {num_ranks} died ({how}); the job was stopped") from None


def culprit(codes: dict[int, int]) -> int:
    """The rank that died of itself; others lost contact with it, or were then stopped by the agent (SIGTERM).

    codes: exit codes by rank, those of signals negative, in the order in which they were seen.
    """

    def doubt(rank: int) -> int:
        if codes[rank] in (LOST_CONTACT, -signal.SIGTERM):
            return 3 if codes[rank] == LOST_CONTACT else 2
        return 0 if codes[rank] < 0 else 1

    return min(codes, key=doubt)
