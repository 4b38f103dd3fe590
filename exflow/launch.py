"""Start the ranks of a job on this machine, and end them all, with a clear word, when one of them dies."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from dataclasses import dataclass
from typing import NoReturn

ERROR = 1  # exit code of a rank with an error of its own, of which it has told, or Python with a traceback
BAD_INPUT = 2  # exit code where the user's input is at fault
LOST_CONTACT = 3  # exit code of a rank that found another one gone
PATIENCE_S = 600.0  # how long a rank waits for another one, which may be slow, before it gives it up


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
    """Another rank went away, or gave no sign of life for too long. `told`: by another rank of this node."""

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


def end(code: int) -> NoReturn:
    """End the program with an exit code, and a rank at once.

    A rank that tidied up would wait for others, and close its connections while it still runs: then the
    others end first, and it is not seen which of them it was.
    """
    if torchrun_place() is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_ranks(arguments: list[str], num_ranks: int) -> None:
    """Run `exflow ARGUMENTS` as `num_ranks` ranks under torchrun's agent; returns when all have ended well.

    Standard output and error of the ranks are this process's own. Raises RankDied if a rank ended otherwise;
    exits with code BAD_INPUT if the ranks found the input at fault (the first of them has printed why). No
    rank outlives the call, however it ends; one that does not listen is killed half a minute later.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # RankDied says it in one line
    cores_per_rank = max(1, (os.cpu_count() or 1) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores_per_rank))
    try:
        with tempfile.TemporaryDirectory(prefix="exflow-ranks-") as notes:  # torch would leave it behind
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=num_ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                monitor_interval=0.2,
                logs_specs=DefaultLogsSpecs(log_dir=notes),
                signals_to_handle="SIGQUIT",  # and not those that exflow.signals answers
            )
            elastic_launch(config, sys.executable)("-m", "exflow.cli", *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if BAD_INPUT in codes.values():
            sys.exit(BAD_INPUT)
        raise RankDied(_cause_of_death(codes, num_ranks)) from None


def _cause_of_death(codes: dict[int, int], num_ranks: int) -> str:
    rank = culprit(codes)
    # a rank has said why; one that lost contact waited before that for us to see a death
    if codes[rank] == ERROR or LOST_CONTACT in codes.values():
        return "the job was stopped"
    how = signal.Signals(-codes[rank]).name if codes[rank] < 0 else f"exit code {codes[rank]}"
    hint = "; if nobody killed it, memory ran out (see dmesg)" if how == "SIGKILL" else ""
    return f"rank {rank} of {num_ranks} died ({how}); the job was stopped{hint}"


def culprit(codes: dict[int, int]) -> int:
    """The rank that died of itself; others were then stopped by the agent (SIGTERM).

    codes: exit codes by rank, those of signals negative, in the order in which they were seen.
    """

    def doubt(rank: int) -> int:
        if codes[rank] == -signal.SIGTERM:
            return 2
        return 0 if codes[rank] < 0 else 1

    return min(codes, key=doubt)
