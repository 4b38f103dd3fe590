"""Timing on a GPU, and the bandwidths that the floor of a step is computed from."""

import statistics
from collections.abc import Callable

import torch

from exflow.comm.buffers import symmetric_memory, tensor_at
from exflow.job.cluster import Cluster

COPIED = 1 << 30  # bytes


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median microseconds of `run` on this GPU."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def bandwidths(cluster: Cluster) -> dict[str, float]:
    """GB/s of a copy on this GPU (read and written), and of one to the other GPU's memory."""
    here, there = torch.empty(2, COPIED, dtype=torch.uint8, device=cluster.device)
    here.random_()
    figures = {"copy_gb_s": 2 * COPIED / timed(lambda: there.copy_(here), 10) / 1e3}
    peer = symmetric_memory(cluster)(COPIED // 4)
    address = peer.bases[(cluster.rank + 1) % cluster.num_ranks]
    part = here[: COPIED // 4]
    target = tensor_at(address, part)
    figures["link_gb_s"] = len(part) / timed(lambda: target.copy_(part), 10) / 1e3
    return figures
