"""This process's place among the others: ranks, nodes, device, process groups."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from exflow.errors import InputError


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


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def join_cluster(device_type: str, timeout_s: float = 600) -> Iterator[Cluster]:
    """Join the job that torchrun describes in the environment; gloo on CPUs, NCCL on GPUs."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
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
        yield Cluster(rank, dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]), device)
    finally:
        dist.destroy_process_group()


def coherence_group(cluster: Cluster, group_size: int) -> dist.ProcessGroup:
    """The process group of this rank's block of `group_size` consecutive ranks."""
    mine = None
    for first in range(0, cluster.num_ranks, group_size):
        members = list(range(first, first + group_size))
        group = dist.new_group(members)
        if cluster.rank in members:
            mine = group
    assert mine is not None
    return mine
