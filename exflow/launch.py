"""Start the ranks of a job on this machine, and end them all, with a clear word, when one of them dies."""

import logging
import os
import signal
import sys
import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where torchrun put this process: rank of num_ranks, with ranks_per_node on each node."""

    rank: int
    num_ranks: int
    ranks_per_node: int


def torchrun_place() -> Place | None:
    """This process's place in the job of a torchrun around it; None where there is none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


class RankDied(RuntimeError):
    """A rank of the job ended with an error; the others were stopped."""


def run_ranks(arguments: list[str], num_ranks: int) -> None:
    """Run `exflow ARGUMENTS` as `num_ranks` ranks under torchrun's agent; returns when all have ended well.

    Standard output and error of the ranks are this process's own. Raises RankDied if a rank ended otherwise;
    exits with code 2 if the ranks found the input at fault (the first of them has printed why).
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
    )
    try:
        elastic_launch(config, sys.executable)("-m", "exflow.cli", *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if 2 in codes.values():
            sys.exit(2)
        rank = min(codes, key=codes.__getitem__)  # a signal (negative) is the cause of others' lost contact
        how = signal.Signals(-codes[rank]).name if codes[rank] < 0 else f"exit code {codes[rank]}"
        raise RankDied(f"rank {rank} of {num_ranks} died ({how}); the job was stopped") from None
