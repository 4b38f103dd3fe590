"""Start the ranks of a job on this machine; when one dies, end all of them with a clear message."""

import logging
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

from exflow.console import verbosity
from exflow.errors import InputError
from exflow.job.environment import Place, crowd_in, need_no_names, place_in

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

ERROR = 1  # exit code of a rank with an error of its own, which it, or a Python traceback, has reported
BAD_INPUT = 2  # exit code where the user's input is at fault
LOST_CONTACT = 3  # exit code of a rank that found another one gone
PATIENCE_S = 600.0  # how long a rank waits for another, perhaps slow one before it gives up
LOADING_S = 60.0  # extra time for ranks to load Python and torch, before any of them can wait

STARTED_BY = "EXFLOW_STARTED_BY"  # environment variable of a rank: id of the process that started it

_HOST = "127.0.0.1"
_ENTRY = Path(__file__).with_name("rank.py")
_LOOK_S = 0.1  # seconds between polls of the ranks
_LAST_WORD_S = 2.0  # time for the first rank to report a fault that all ranks find
_END_S = 30.0  # time for a rank to end after SIGTERM


class RankDied(RuntimeError):
    """A rank of the job ended with an error or did not start; the others were stopped."""


class LostContact(RuntimeError):
    """Another rank died, or was silent for too long. told: another rank of this node has reported it."""

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


def torchrun_place() -> Place | None:
    """This process's place in its job from torchrun's variables; None if they are absent or invalid."""
    try:
        return place_in(os.environ)
    except InputError:  # check_start reports it, where it matters
        return None


def check_start() -> None:
    """Check the environment of a command that can run as a job; raises InputError if variables are missing.

    Warns once if a launcher started many processes that form no job.
    """
    if place_in(os.environ) is None and (crowd := crowd_in(os.environ)):
        logging.getLogger(__name__).warning(crowd)


def end(code: int) -> NoReturn:
    """End the program with an exit code; a rank ends at once, without cleanup.

    Cleanup would wait for other ranks and close connections while this one still runs. The others would then
    end first, and the launcher could not see which rank was at fault.
    """
    if torchrun_place() is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_ranks(work: Callable[[], object], num_ranks: int, patience_s: float = PATIENCE_S) -> None:
    """Do `work` on each of `num_ranks` ranks on this machine; returns when all have ended with success.

    `work` is pickled for the ranks: a function of a module, or a `partial` of one. Ranks write to this
    process's stdout and stderr. Raises RankDied if a rank failed or did not start. Exits with code BAD_INPUT
    if the ranks found the input at fault; the first of them has printed why. No rank outlives the call: one
    that ignores SIGTERM is killed after _END_S seconds.
    """
    need_no_names()
    store, port = _meeting_place()
    handed = pickle.dumps((verbosity, work))
    ranks: list[Popen[bytes]] = []
    try:
        for rank in range(num_ranks):
            ranks.append(_started(handed, rank, num_ranks, port))  # noqa: PERF401 (to end them)
        codes = _watch(ranks, lambda: without("came", store, num_ranks), patience_s + LOADING_S)
        if BAD_INPUT in codes.values():
            with suppress(TimeoutExpired):
                ranks[0].wait(_LAST_WORD_S)
            sys.exit(BAD_INPUT)
    finally:
        _stop(ranks)
    if codes:
        raise RankDied(_cause_of_death(codes, num_ranks))


def without(word: str, store: "Store", num_ranks: int) -> list[int]:
    """The ranks that have not posted `word` in the job's store."""
    return [rank for rank in range(num_ranks) if not store.check([f"exflow/{word}/{rank}"])]


def _meeting_place() -> tuple["Store", int]:
    """The store of a job on this machine, and its port; it listens on loopback only."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        listener = socket.create_server((_HOST, 0))
        with socket.create_connection(listener.getsockname(), timeout=LOADING_S):  # torch would retry long
            listener.accept()[0].close()
    except OSError as error:
        raise InputError(
            f"{_HOST}: ranks cannot meet there ({error.strerror or error}); `ip link set lo up`"
        ) from error
    port = listener.getsockname()[1]
    handle = listener.detach()
    return TCPStore(_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=handle), port


def _started(handed: bytes, rank: int, num_ranks: int, port: int) -> Popen[bytes]:
    """Start a rank with its work on stdin. It imports this package, nothing from the current folder."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "exflow",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        STARTED_BY: str(os.getpid()),
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),  # an empty path means the current folder
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun sets it
    try:
        rank_process = Popen(
            [sys.executable, str(_ENTRY)], stdin=PIPE, env=environment, start_new_session=True
        )
    except OSError as error:
        raise RankDied(
            f"rank {rank} of {num_ranks} cannot be started ({error.strerror}); start fewer (see `ulimit -a`)"
        ) from error
    # a pipe holds little, and a rank that hangs reads nothing
    Thread(target=_hand_over, args=(handed, rank_process), daemon=True).start()
    return rank_process


def _hand_over(handed: bytes, rank_process: Popen[bytes]) -> None:
    assert rank_process.stdin is not None
    with suppress(BrokenPipeError), rank_process.stdin as stdin:
        stdin.write(handed)


def _watch(ranks: list[Popen[bytes]], missing: Callable[[], list[int]], patience_s: float) -> dict[int, int]:
    """Wait until all ranks have ended or one has failed; return the exit codes of failed ranks, by rank.

    missing: lists the ranks that have not started. Raises RankDied if there are any after `patience_s`.
    """
    deadline, have_come = time.monotonic() + patience_s, False
    while True:
        codes = {rank: process.poll() for rank, process in enumerate(ranks)}
        bad = {rank: code for rank, code in codes.items() if code}
        if bad or None not in codes.values():
            return bad
        have_come = have_come or not (absent := missing())
        if not have_come and time.monotonic() > deadline:
            raise RankDied(
                f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} of {len(ranks)} did not start "
                f"within {patience_s:g} s; the job was stopped; if loading takes long, give more --patience"
            )
        time.sleep(_LOOK_S)


def _stop(ranks: list[Popen[bytes]]) -> None:
    """Send SIGTERM to the ranks that still run, and SIGKILL to any that do not end in time."""
    try:
        _send(signal.SIGTERM, ranks)
        deadline = time.monotonic() + _END_S
        with suppress(TimeoutExpired):
            for rank in ranks:
                rank.wait(max(0, deadline - time.monotonic()))
    finally:  # also if a signal to this process interrupts the wait
        _send(signal.SIGKILL, ranks)


def _send(number: signal.Signals, ranks: list[Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, number)


def _cause_of_death(codes: dict[int, int], num_ranks: int) -> str:
    rank = culprit(codes)
    # a rank has reported why; one that lost contact waited first, so that a death would be seen here
    if codes[rank] == ERROR or LOST_CONTACT in codes.values():
        return "the job was stopped"
    how = signal.Signals(-codes[rank]).name if codes[rank] < 0 else f"exit code {codes[rank]}"
    hint = "; if nobody killed it, memory ran out (see dmesg)" if how == "SIGKILL" else ""
    return f"rank {rank} of {num_ranks} died ({how}); the job was stopped{hint}"


def culprit(codes: dict[int, int]) -> int:
    """The rank that died first; others were then stopped (SIGTERM).

    codes: exit codes by rank in the order in which they were seen; -N for signal N.
    """

    def doubt(rank: int) -> int:
        if codes[rank] == -signal.SIGTERM:
            return 2
        return 0 if codes[rank] < 0 else 1

    return min(codes, key=doubt)
