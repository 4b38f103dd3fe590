"""This process's place among the others: ranks, nodes, device, process groups."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from exflow.errors import InputError, WrongResult
from exflow.job.environment import Place, need_no_names, place_in
from exflow.job.launch import PATIENCE_S, LostContact
from exflow.job.liveness import LivenessMonitor, tells_of_a_lost_rank
from exflow.job.signals import leave_signals

Result = TypeVar("Result")

_NO_INTERFACE = "Unable to find address"  # gloo's words
_TAKEN = "EADDRINUSE"  # the store's


@dataclass(frozen=True)
class Cluster:
    """Rank `rank` of `num_ranks`; each node has `ranks_per_node` consecutive ranks."""

    rank: int
    num_ranks: int
    ranks_per_node: int
    device: torch.device
    patience_s: float = PATIENCE_S

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def node(self) -> int:
        return self.node_of(self.rank)

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node


@contextmanager
def join_cluster(device_type: str, patience_s: float = PATIENCE_S) -> Iterator[Cluster]:
    """Join the job that the environment describes, in torchrun's variables; gloo on CPUs, NCCL on GPUs.

    Raises InputError for an impossible job, and LostContact if another rank dies or does not answer within
    `patience_s` seconds. If several ranks of a node raise WrongResult at once, only the first keeps it.
    """
    place = place_in(os.environ)
    assert place is not None
    device = _device_of(place, device_type)
    if place.ranks_per_node == place.num_ranks:
        need_no_names()
    leave_signals()  # torch waits for other ranks in C++, where Python handles no signal
    patience, monitor = timedelta(seconds=patience_s), LivenessMonitor(place, patience_s)
    try:
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=monitor.open(),
            rank=place.rank,
            world_size=place.num_ranks,
            timeout=patience,
            device_id=device if device_type == "cuda" else None,
        )
        monitor.joined = True
        yield Cluster(place.rank, place.num_ranks, place.ranks_per_node, device, patience_s)
    except WrongResult as error:
        if monitor.is_told():
            raise LostContact(str(error), told=True) from error
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and _NO_INTERFACE in str(error):
            named = os.environ.get("GLOO_SOCKET_IFNAME")
            raise InputError(
                f"GLOO_SOCKET_IFNAME={named}: no such network interface; see `ip link`"
            ) from error
        if isinstance(error, RuntimeError) and _TAKEN in str(error):
            port = os.environ["MASTER_PORT"]
            raise InputError(
                f"MASTER_PORT={port}: is taken, by another job or another process with RANK=0; choose another"
            ) from error
        if isinstance(error, RuntimeError) and tells_of_a_lost_rank(error):
            raise monitor.lost(error) from error
        error.add_note(f"on rank {place.rank} of {place.num_ranks}")  # for the traceback
        raise
    dist.destroy_process_group()  # not after an error: it would wait for a rank that may be gone


@contextmanager
def annotate_errors(what: str) -> Iterator[None]:
    """Add `what`, the name of the operation inside, to a RuntimeError, for the message of a LostContact."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(what)
        raise


def _device_of(place: Place, device_type: str) -> torch.device:
    if device_type != "cuda":
        return torch.device(device_type)
    if place.ranks_per_node > torch.cuda.device_count():
        raise InputError(
            f"{place.ranks_per_node} ranks are on this node, but torch sees "
            f"{torch.cuda.device_count()} GPU(s); start one per GPU, or compute on cpu"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def raise_on_all_ranks(cluster: Cluster, work: Callable[[], Result]) -> Result:
    """Do `work`; if it raises an InputError on any rank, every rank raises that error. Collective.

    Otherwise one rank would stop while the others wait for it in the next collective.
    """
    result: list[Result] = []
    fault = None
    try:
        result.append(work())
    except InputError as error:
        fault = str(error)
    for message in all_gather_object(cluster, fault):
        if message is not None:
            raise InputError(message)
    return result[0]


@annotate_errors("a gather of objects")
def all_gather_object(cluster: Cluster, mine: Result) -> list[Result]:
    """Every rank's `mine`, by rank. Collective."""
    if cluster.num_ranks == 1:
        return [mine]
    gathered: list[Result] = [mine] * cluster.num_ranks
    dist.all_gather_object(gathered, mine)
    return gathered


@dataclass(frozen=True)
class CoherenceGroup:
    """Consecutive ranks that share the context of their sequences, this rank among them."""

    ranks: range
    processes: dist.ProcessGroup

    @property
    def size(self) -> int:
        return len(self.ranks)


@annotate_errors("the making of groups")
def coherence_group(cluster: Cluster, size: int) -> CoherenceGroup:
    """The block of `size` consecutive ranks that contains this rank; collective over the whole job."""
    blocks = [range(first, first + size) for first in range(0, cluster.num_ranks, size)]
    patience = timedelta(seconds=cluster.patience_s)  # a group does not inherit its job's timeout
    groups = [CoherenceGroup(block, dist.new_group(list(block), timeout=patience)) for block in blocks]
    return groups[cluster.rank // size]
