"""Place of this process in its job, from the environment variables of torchrun and other launchers."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from exflow.errors import InputError

_JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HERE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_STARTERS = {  # launchers of many processes, with their variables for a process's number and the count
    # not SLURM_NTASKS: it is set without srun, too
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE"),
}


@dataclass(frozen=True)
class Place:
    """Position of this process in its job: rank of num_ranks, with ranks_per_node on each node."""

    rank: int
    num_ranks: int
    local_rank: int
    ranks_per_node: int


def has_agent(environment: Mapping[str, str]) -> bool:
    """True if torchrun or --nproc started this process; that launcher keeps the store and ends the ranks."""
    return "TORCHELASTIC_RUN_ID" in environment


def place_in(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun's variables give, whoever set them; None for a single process.

    Raises InputError if variables are missing or contradict one another.
    """
    given = {name: environment[name] for name in (*_JOB, *_HERE) if environment.get(name)}
    if not has_agent(environment):
        if not given.keys() & {"RANK", "WORLD_SIZE"}:
            return None
        if given.get("WORLD_SIZE") == "1" and given.get("RANK", "0") == "0":
            return None  # a job of one, as some clusters describe it
        if given.get("MASTER_ADDR") in _LOOPBACK:  # all ranks are on this host
            for here, of_job in zip(_HERE, _JOB, strict=False):
                given.setdefault(here, given.get(of_job, ""))
    missing = [name for name in (*_JOB, *_HERE) if not given.get(name)]
    if missing:
        raise InputError(f"{_named(environment)} without {', '.join(missing)}{_remedy(given)}")
    return _checked(given)


def need_no_names() -> None:
    """Let the ranks of one host connect without name lookups, which hang in containers without a resolver."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _INTERFACE)  # else gloo looks up the host's own
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # torch's sockets look up 127.0.0.1


def crowd_in(environment: Mapping[str, str]) -> str | None:
    """The warning for processes that one launcher started but that form no job; None except on the first."""
    for starter, names in _STARTERS.items():
        number, count = (environment.get(name, "") for name in names)
        if number == "0" and _is_number(count) and int(count) > 1:
            return (
                f"{starter} started {count} processes, and each does the whole job by itself; for one job of "
                f"{count} ranks on one host start one process with --nproc {count}, on several hosts a "
                "torchrun on each: torchrun --nnodes NODES --nproc-per-node RANKS --rdzv-backend c10d "
                "--rdzv-endpoint HOST:29500 --no-python exflow ..."
            )
    return None


def _checked(given: Mapping[str, str]) -> Place:
    for name in (*_JOB, *_HERE):
        if name != "MASTER_ADDR" and not _is_number(given[name]):
            raise InputError(f"{name}={given[name]}: is no whole number{_remedy({})}")
    rank, num_ranks, local_rank, ranks_per_node = (int(given[name]) for name in (*_JOB[:2], *_HERE))
    for fault, names in (
        (rank >= num_ranks, ("RANK", "WORLD_SIZE")),
        (local_rank >= ranks_per_node, ("LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    ):
        if fault:
            number, count = names
            raise InputError(
                f"{number}={given[number]}: {count}={given[count]}; count from 0{_remedy(given)}"
            )
    if num_ranks % ranks_per_node:
        raise InputError(
            f"torchrun: {ranks_per_node} of {num_ranks} ranks are on this node; "
            "start the same number on every node"
        )
    if rank % ranks_per_node != local_rank:
        raise InputError(
            f"RANK={rank}: LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={ranks_per_node}; the ranks of a node "
            f"must be consecutive (srun --distribution=block){_remedy({})}"
        )
    if not (num_ranks > 1) <= int(given["MASTER_PORT"]) < 1 << 16:  # a job of one may have 0: any free port
        raise InputError(f"MASTER_PORT={given['MASTER_PORT']}: is no port; give one of 1 to 65535")
    return Place(rank, num_ranks, local_rank, ranks_per_node)


def _named(environment: Mapping[str, str]) -> str:
    """`NAME=VALUE` of the first variable that says this process is a rank."""
    name = next(name for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID") if name in environment)
    return f"{name}={environment[name]}"


def _remedy(given: Mapping[str, str]) -> str:
    return (
        "; torchrun sets all of them (torchrun --nproc-per-node "
        f"{given.get('WORLD_SIZE', 'RANKS')} --no-python exflow ...); for one process unset RANK, WORLD_SIZE "
        "and TORCHELASTIC_RUN_ID"
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
