"""Traces with planted groups of experts, and checks of the plans made for them."""

import numpy as np

from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.evaluate import evaluate
from exflow.placement.traffic.traffic import Traffic, count_traffic
from exflow.profiling.trace import RoutingTrace

TWO, FOUR = Topology(gpus_per_node=2), Topology(gpus_per_node=4)
TWO_NODES = Topology(num_nodes=2, gpus_per_node=2)


def planted(
    seed: int = 0,
    *,
    tokens: int = 1200,
    layers: int = 3,
    experts: int = 16,
    groups: int = 4,
    top_k: int = 2,
    noise: float = 0.1,
    hot: float = 0.0,
    siblings: float = 0.0,
    kinds: int = 0,
) -> tuple[RoutingTrace, np.ndarray]:
    """A trace, and the group of each expert [L, E] that was planted: equal groups, drawn anew by layer.

    A sequence's tokens select the experts of its group, but for a share `noise` of tokens and layers, which
    select from any. `hot` of the tokens take the group's first expert; `siblings` of the tokens and layers
    lie in the other group of a pair 2n, 2n + 1. `kinds` is the seed of the groups.
    """
    rng, drawn = np.random.default_rng([seed, 1]), np.random.default_rng([kinds, 2])
    members = drawn.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1).reshape(layers, groups, -1)
    size = experts // groups
    sequence = np.arange(tokens) // 20
    drawn_group = rng.permutation(sequence[-1] + 1) % groups  # whatever the home is
    group = np.repeat(drawn_group[sequence][:, None], layers, axis=1)
    group ^= rng.random(group.shape) < siblings
    stray = rng.random(group.shape) < noise
    group[stray] = rng.integers(0, groups, stray.sum())
    order = rng.permuted(np.tile(np.arange(size), (tokens, layers, 1)), axis=2)
    first = np.argsort(order != 0, axis=2, kind="stable")
    order = np.where(
        (rng.random((tokens, layers)) < hot)[..., None], np.take_along_axis(order, first, 2), order
    )
    chosen = members[np.arange(layers)[:, None], group[..., None], order[:, :, :top_k]]
    trace = RoutingTrace.from_arrays(chosen, num_experts=experts, sequence=sequence, model="planted")
    of = np.empty((layers, experts), dtype=np.int64)
    np.put_along_axis(of, members.reshape(layers, -1), np.repeat(np.arange(groups), size)[None], axis=1)
    return trace, of


def check_valid(plan: Plan, trace: RoutingTrace, topology: Topology, num_slots: int) -> None:
    assert plan.topology == topology
    assert plan.physical_to_logical_map.shape == (trace.num_layers, num_slots)
    for row, count in zip(plan.physical_to_logical_map, trace.experts_per_layer, strict=True):
        assert set(row.tolist()) == set(range(count))
        by_rank = row.reshape(topology.num_ranks, -1)
        assert np.array_equal(by_rank, np.sort(by_rank, axis=1))
    plan.check_trace(trace)
    assert plan.trace_digest == trace.digest()
    assert plan.expected == evaluate(plan, trace)
    if plan.objective is not None:
        assert plan.lower_bound is not None
        assert plan.lower_bound <= plan.objective


def traffic(plan: Plan, trace: RoutingTrace) -> Traffic:
    return count_traffic(trace, plan, plan.group_size)


def messages(plan: Plan, trace: RoutingTrace) -> float:
    return traffic(plan, trace).messages / trace.num_tokens
