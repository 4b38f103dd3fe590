"""This process's place among the others: ranks, nodes, device, process groups."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from exflow.errors import InputError
from exflow.launch import torchrun_place

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cluster:
    """Rank `rank` of `num_ranks`; each node has `ranks_per_node` consecutive ranks."""

    rank: int
    num_ranks: int
    ranks_per_node: int
    device: torch.device

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def node(self) -> int:
        return self.node_of(self.rank)

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node


@contextmanager
def join_cluster(device_type: str, timeout_s: float = 600) -> Iterator[Cluster]:
    """Join the job that torchrun describes in the environment; gloo on CPUs, NCCL on GPUs."""
    place = torchrun_place()
    assert place is not None
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(device_type)
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--nproc: rank {local_rank} of this node has no GPU, torch sees {torch.cuda.device_count()}; "
                "start fewer ranks a node, or give --device cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device_type == "cuda" else None,
    )
    try:
        yield Cluster(place.rank, place.num_ranks, place.ranks_per_node, device)
    finally:
        dist.destroy_process_group()


def alike_on_all_ranks(cluster: Cluster, work: Callable[[], Result]) -> Result:
    """Do `work`; if any rank finds the input at fault, every rank raises that rank's InputError.

    Without it one rank would stop while the others wait for it in the next collective.
    """
    result: list[Result] = []
    fault = None
    try:
        result.append(work())
    except InputError as error:
        fault = str(error)
    faults: list[str | None] = [None] * cluster.num_ranks
    dist.all_gather_object(faults, fault)
    for message in faults:
        if message is not None:
            raise InputError(message)
    return result[0]


@dataclass(frozen=True)
class CoherenceGroup:
    """Consecutive ranks that share the context of their sequences, this rank among them."""

    ranks: range
    processes: dist.ProcessGroup

    @property
    def size(self) -> int:
        return len(self.ranks)


def coherence_group(cluster: Cluster, size: int) -> CoherenceGroup:
    """The block of `size` consecutive ranks that this rank lies in; every rank of the job must call it."""
    blocks = [range(first, first + size) for first in range(0, cluster.num_ranks, size)]
    groups = [CoherenceGroup(block, dist.new_group(list(block))) for block in blocks]
    return groups[cluster.rank // size]
