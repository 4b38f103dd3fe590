"""Measures the machine of a job: links, memory, launches, matrix products. Collective.

Each is measured as the decode step will use it: eagerly, or many times in one captured graph.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from exflow.comm.buffers import symmetric_memory, tensor_at
from exflow.comm.capacity import ROUND_BYTES
from exflow.comm.pairwise import Chunks, PairwiseExchange
from exflow.comm.transport_names import Transport
from exflow.job.cluster import Cluster, all_gather_object, coherence_group
from exflow.placement.time.machine import Link, Machine

SMALL = 64  # bytes from each rank to each other rank
LARGE = {"cpu": 1 << 18, "cuda": 1 << 22}
READ = {"cpu": 1 << 26, "cuda": 1 << 29}  # bytes; on a GPU more than its cache
LAUNCHES = {"eager": 60, "collective": 10, "one-sided": 10, "relayed": 12}  # kernels of a layer, roughly
RUNS = 9
IN_A_GRAPH = 20

Exchange = Callable[[int], Callable[[], object]]  # makes an exchange, given the bytes for each other rank
Timer = Callable[[Cluster, Callable[[], object]], float]


def measure(cluster: Cluster, transport: Transport = "eager") -> Machine:
    """Measure every rank and take the slowest one's figures, so that all ranks agree. Collective."""
    timer = _eager_s if transport == "eager" else _captured_s
    inside, between = _links(cluster, transport, timer)
    values = torch.zeros(READ[cluster.device.type] // 4, device=cluster.device)
    launched = torch.zeros(16, device=cluster.device)
    mine = (
        timer(cluster, lambda: values.sum()),
        LAUNCHES[transport] * timer(cluster, lambda: [launched.add_(1) for _ in range(64)]) / 64,
        -free_bytes(cluster),
    )
    read_s, layer_s, memory = (max(each) for each in zip(*all_gather_object(cluster, mine), strict=True))
    return Machine(
        inside,
        between,
        values.nbytes / read_s,
        -memory,
        layer_s,
        round_bytes=ROUND_BYTES[cluster.device.type],
        # a captured collective waits for earlier kernels of its stream
        hides=0.0 if cluster.device.type == "cpu" or transport in ("collective", "relayed") else 1.0,
        shared=cluster.device.type == "cpu" and cluster.num_nodes == 1,
        transport=transport,
        flops_per_s=math.inf if transport == "eager" else _flops_per_s(cluster),
    )


def _flops_per_s(cluster: Cluster) -> float:
    """FLOP/s of a large product in bfloat16, on the slowest rank."""
    side = 4096
    a, b = torch.randn(2, side, side, device=cluster.device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    seconds = _captured_s(cluster, lambda: torch.mm(a, b, out=out))
    (slowest,) = (max(each) for each in zip(*all_gather_object(cluster, (seconds,)), strict=True))
    return float(2 * side**3 / slowest)


def link_of(small_s: float, large_s: float, small_bytes: float, large_bytes: float) -> Link:
    """Fit latency and bandwidth to the times of a small and of a large exchange of one rank."""
    per_byte = max((large_s - small_s) / (large_bytes - small_bytes), 1e-15)
    return Link(max(small_s - small_bytes * per_byte, 0.0), 1 / per_byte)


def _links(cluster: Cluster, transport: Transport, timer: Timer) -> tuple[Link, Link]:
    """Measure the links inside a node and between nodes."""
    ranks, near = cluster.num_ranks, cluster.ranks_per_node
    everyone, node = coherence_group(cluster, ranks), coherence_group(cluster, near)
    if transport == "one-sided":
        return _link(cluster, _one_sided(cluster), near - 1, timer), Link(0.0, float("inf"))
    if transport == "relayed":
        between = _link(cluster, _among_relays(cluster), cluster.num_nodes - 1, timer)
        return _link(cluster, _one_sided(cluster), near - 1, timer), between
    inside = _link(cluster, _all_to_all(cluster, node.processes, near), near - 1, timer)
    pairwise = PairwiseExchange.between(cluster)
    exchange = _all_to_all(cluster, everyone.processes, ranks) if pairwise is None else _pairwise(pairwise)
    return inside, _link(cluster, exchange, ranks - near, timer)


def _link(cluster: Cluster, exchange: Exchange, far: int, timer: Timer) -> Link:
    """Measure one link. far: number of other ranks that a rank reaches by it."""
    if far < 1:
        return Link(0.0, float("inf"))
    large = LARGE[cluster.device.type]
    times = all_gather_object(cluster, (timer(cluster, exchange(SMALL)), timer(cluster, exchange(large))))
    small_s, large_s = (max(each) for each in zip(*times, strict=True))
    return link_of(small_s, large_s, far * SMALL, far * large)


def _all_to_all(cluster: Cluster, group: dist.ProcessGroup, ranks: int) -> Exchange:
    def exchange(size: int) -> Callable[[], object]:
        sent = torch.zeros(ranks * size, dtype=torch.uint8, device=cluster.device)
        received = torch.empty_like(sent)
        return lambda: dist.all_to_all_single(received, sent, group=group)

    return exchange


def _pairwise(pairwise: PairwiseExchange) -> Exchange:
    def exchange(size: int) -> Callable[[], object]:
        sent, received = torch.zeros(2, pairwise.cluster.num_ranks, size, dtype=torch.uint8)
        return lambda: pairwise.swap(Chunks(list(sent), list(received)))

    return exchange


def _among_relays(cluster: Cluster) -> Exchange:
    """An exchange with the ranks that have this rank's place in other nodes."""
    near, ranks = cluster.ranks_per_node, range(cluster.num_ranks)
    relays = [rank for rank in ranks if rank != cluster.rank and (rank - cluster.rank) % near == 0]

    def exchange(size: int) -> Callable[[], object]:
        sizes = [size if rank in relays else 0 for rank in ranks]
        sent = torch.zeros(sum(sizes), dtype=torch.uint8, device=cluster.device)
        received = torch.empty_like(sent)
        return lambda: dist.all_to_all_single(received, sent, sizes, sizes)

    return exchange


def _one_sided(cluster: Cluster) -> Exchange:
    """Stores into the memory of every other rank of the node, and a barrier; for SMALL bytes no stores."""
    memory = symmetric_memory(cluster)(LARGE["cuda"])
    others = [
        tensor_at(base, memory.own) for rank, base in enumerate(memory.bases) if base and rank != cluster.rank
    ]
    sent = torch.zeros_like(memory.own)

    def exchange(size: int) -> Callable[[], object]:
        def write_and_meet() -> None:
            if size > SMALL:
                for other in others:
                    other.copy_(sent)
            memory.meet()

        return write_and_meet

    return exchange


def _eager_s(cluster: Cluster, work: Callable[[], object]) -> float:
    """Seconds of `work`: the median of RUNS runs after a warm-up."""
    taken = []
    for _ in range(RUNS + 1):
        _synchronise(cluster)
        start = time.perf_counter()
        work()
        _synchronise(cluster)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _captured_s(cluster: Cluster, work: Callable[[], object]) -> float:
    """Seconds of `work`, repeated IN_A_GRAPH times in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_GRAPH):
            work()
    return _eager_s(cluster, graph.replay) / IN_A_GRAPH


def _synchronise(cluster: Cluster) -> None:
    if cluster.device.type == "cuda":
        torch.cuda.synchronize(cluster.device)


def free_bytes(cluster: Cluster) -> float:
    """Free memory of this rank's device; on a CPU its share of the available memory, caches included."""
    if cluster.device.type == "cuda":
        return float(torch.cuda.mem_get_info(cluster.device)[0])
    known = Path("/proc/meminfo")
    if not known.exists():
        return math.inf
    kibibytes = dict(line.split(":") for line in known.read_text().splitlines())["MemAvailable"]
    return 1024 * int(kibibytes.split()[0]) / cluster.ranks_per_node
