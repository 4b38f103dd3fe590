"""Strategy `auto`: measure the ranks once, predict every strategy, take the fastest that fits. Collective."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from exflow.cost_model import Link, Load, Machine, Moved, Prediction, choose, predict
from exflow.distributed import Cluster, coherence_group
from exflow.expectation import ROUND_BYTES
from exflow.placement.plan import Plan
from exflow.placement.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.strategies import NAMES, Name

SMALL, LARGE = 64, 1 << 18  # bytes from each rank to each other one
READ = 1 << 26  # bytes
LAUNCHES = 60  # of kernels in an eager layer, about
GUESSED_TOKENS = 512


def choose_strategy(load: Load, plan: Plan, cluster: Cluster) -> tuple[Name, str]:
    """The strategy for `load` on these ranks and why, equal on all of them; every rank must call it.

    A plan for other nodes than these is judged as one whose figures are not known. Raises InputError on all
    ranks alike if no strategy fits into memory.
    """
    here = Topology(num_nodes=cluster.num_nodes, gpus_per_node=cluster.ranks_per_node)
    if (plan.topology.num_nodes, plan.num_ranks) != (here.num_nodes, here.num_ranks):
        plan = replace(plan, topology=here, expected={})
    machine = measure(cluster)
    return choose(predictions(load, plan, machine), machine.memory_bytes)


def predictions(load: Load, plan: Plan, machine: Machine) -> list[Prediction]:
    """What each strategy takes, by the figures that the plan expects of its own trace."""
    figures = expected_figures(plan, load.top_k)
    sizes = {"dispatch-combine": 1, "node-coherent": load.ranks_per_node, "coherent": load.ranks}
    return [
        predict(name, load, Moved.of(figures[name.replace("-", "_")], sizes.get(name, 1)), machine)
        for name in NAMES
        if name.replace("-", "_") in figures
    ]


def expected_figures(plan: Plan, top_k: int) -> dict[str, Any]:
    """By strategy what the plan expects; of a plan that does not say, what it does to random routing."""
    if "strategies" in plan.expected:
        stored: dict[str, Any] = plan.expected["strategies"]
        return stored
    from exflow.placement.evaluate import evaluate  # compiled: not needed with a plan that knows its figures

    draw = np.random.default_rng(0).random((GUESSED_TOKENS, plan.num_layers, plan.num_experts))
    experts = draw.argpartition(top_k - 1, axis=2)[:, :, :top_k]
    trace = RoutingTrace.from_arrays(
        experts,
        num_experts=plan.num_experts,
        sequence=np.arange(GUESSED_TOKENS) % (8 * plan.num_ranks),
        model=plan.model,
        moe_layer_ids=plan.moe_layer_ids,
        num_hidden_layers=plan.num_hidden_layers,
        experts_per_layer=plan.experts_per_layer,
    )
    guessed: dict[str, Any] = evaluate(plan, trace)["strategies"]
    return guessed


def moved_by(plan: Plan, trace: RoutingTrace, group_size: int) -> Moved:
    """What any group size moves on a trace, by the same count."""
    from exflow.placement.evaluate import exchanges_per_step
    from exflow.placement.traffic import follow, imbalance_of, total

    followed = follow(trace, plan, group_size)
    traffic = total(followed, plan, group_size)
    return Moved(
        group_size=group_size,
        exchanges=exchanges_per_step(plan.num_layers, trace.top_k, group_size, plan.num_ranks),
        dispatch=(
            traffic.per_token_layer(traffic.dispatch_intra),
            traffic.per_token_layer(traffic.dispatch_inter),
        ),
        give_back=(
            traffic.per_token_layer(traffic.return_intra),
            traffic.per_token_layer(traffic.return_inter),
        ),
        kv=(traffic.per_token_attention(traffic.kv_intra), traffic.per_token_attention(traffic.kv_inter)),
        busiest=float(imbalance_of(followed.load.sum(axis=0)).mean()),
        attending=float(followed.attended.max() / followed.attended.mean()),
    )


def measure(cluster: Cluster) -> Machine:
    """What the ranks of this job run on, the slowest of them; equal on all, and all must call it."""
    everyone = coherence_group(cluster, cluster.num_ranks)
    node = coherence_group(cluster, cluster.ranks_per_node)
    between = _link(
        cluster, everyone.processes, cluster.num_ranks, cluster.num_ranks - cluster.ranks_per_node
    )
    inside = _link(cluster, node.processes, cluster.ranks_per_node, cluster.ranks_per_node - 1)
    values = torch.zeros(READ // 4, device=cluster.device)
    launched = torch.zeros(16, device=cluster.device)
    mine = (
        _seconds(cluster, lambda: values.sum()),
        LAUNCHES * _seconds(cluster, lambda: [launched.add_(1) for _ in range(64)]) / 64,
        -_memory_bytes(cluster),
    )
    read_s, layer_s, memory = (max(each) for each in zip(*_of_all(cluster, mine), strict=True))
    return Machine(
        inside,
        between,
        READ / read_s,
        -memory,
        layer_s,
        round_bytes=ROUND_BYTES[cluster.device.type],
        hides=1.0 if cluster.device.type == "cuda" else 0.0,
    )


def link_of(small_s: float, large_s: float, small_bytes: float, large_bytes: float) -> Link:
    """The link over which an exchange takes so long when a rank sends so many bytes."""
    per_byte = max((large_s - small_s) / (large_bytes - small_bytes), 1e-15)
    return Link(max(small_s - small_bytes * per_byte, 0.0), 1 / per_byte)


def _link(cluster: Cluster, group: dist.ProcessGroup, ranks: int, far: int) -> Link:
    """far: of the ranks of the group those that the link leads to from each."""
    if far < 1:
        return Link(0.0, float("inf"))

    def exchange(size: int) -> float:
        sent = torch.zeros(ranks * size, dtype=torch.uint8, device=cluster.device)
        received = torch.empty_like(sent)
        return _seconds(cluster, lambda: dist.all_to_all_single(received, sent, group=group))

    times = _of_all(cluster, (exchange(SMALL), exchange(LARGE)))
    small_s, large_s = (max(each) for each in zip(*times, strict=True))
    return link_of(small_s, large_s, far * SMALL, far * LARGE)


def _seconds(cluster: Cluster, work: Callable[[], object], repeats: int = 9) -> float:
    """The median of some runs, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        _synchronise(cluster)
        start = time.perf_counter()
        work()
        _synchronise(cluster)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _synchronise(cluster: Cluster) -> None:
    if cluster.device.type == "cuda":
        torch.cuda.synchronize(cluster.device)


def _memory_bytes(cluster: Cluster) -> float:
    if cluster.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(cluster.device)
        return float(free)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / cluster.ranks_per_node


def _of_all(cluster: Cluster, mine: tuple[float, ...]) -> list[tuple[float, ...]]:
    gathered: list[Any] = [None] * cluster.num_ranks
    dist.all_gather_object(gathered, mine)
    return gathered
