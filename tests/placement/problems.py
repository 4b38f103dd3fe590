"""Placement problems of small traces."""

from collections.abc import Sequence

import numpy as np

from exflow.placement.counts.affinity import count_affinity
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective, make_problem
from exflow.placement.solve.problem import PlacementProblem
from exflow.profiling.trace import RoutingTrace

FREE = Objective(balance_price=0)


def problem_of(
    traces: RoutingTrace | Sequence[RoutingTrace],
    topology: Topology,
    objective: Objective = FREE,
    *,
    weights: Sequence[float] | None = None,
    replicas: np.ndarray | None = None,
) -> PlacementProblem:
    traces = [traces] if isinstance(traces, RoutingTrace) else traces
    counts = [count_affinity(trace) for trace in traces]
    if replicas is None:
        replicas = np.ones(counts[0].load.shape, dtype=np.int64)
    return make_problem(counts, weights or [1.0] * len(counts), topology, objective, replicas)


def gpus(count: int) -> Topology:
    return Topology(gpus_per_node=count)


def trace_of(tokens: int, layers: int, top_k: int, seed: int, experts: int = 8) -> RoutingTrace:
    ids = np.random.default_rng(seed).permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)
    return RoutingTrace.from_arrays(ids[..., :top_k], num_experts=experts)
