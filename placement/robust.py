"""A plan for the worst of several domains: `exflow place TRACE... --worst-case`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from exflow.placement.counts.affinity import count_affinity
from exflow.placement.make_plan import place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import count_traffic
from exflow.profiling.trace import RoutingTrace

_ROUNDS = 8
_RATE = 20.0  # of the weights' growth with a domain's share of excess: 5% above the mean makes it 2.7 times


def place_for_the_worst(
    traces: Sequence[RoutingTrace],
    topology: Topology,
    *,
    solving: Any,
    tell: Callable[[int, float], None] = lambda rounds, worst: None,
    **options: Any,
) -> Plan:
    """Make the plan with the fewest messages on its worst trace, among plans for weighted means of the
    traces.

    Multiplicative weights (Arora, Hazan and Kale, 2012): each round places for a weighted mean of the traces,
    then a trace gains weight by how far its messages are above the mean. The time limit is shared by the
    rounds. Other arguments are those of `place`. `tell` is called after each round
    with its number and the best worst figure so far.
    """
    counts = [count_affinity(trace) for trace in traces]
    share = replace(solving, time_limit=solving.time_limit / _ROUNDS)
    log_weights = np.zeros(len(traces))
    best, least = None, math.inf
    for done in range(1, _ROUNDS + 1):
        weights = np.exp(log_weights - log_weights.max())
        plan = place(traces, topology, weights=weights.tolist(), counts=counts, solving=share, **options)
        figures = np.array([messages(plan, trace) for trace in traces])
        if figures.max() < least:
            best, least = plan, figures.max()
        log_weights += _RATE * (figures / figures.mean() - 1) if figures.any() else 0
        tell(done, least)
    assert best is not None
    return best


def messages(plan: Plan, trace: RoutingTrace) -> float:
    """Messages per token and MoE layer, under the strategy that the plan was made for."""
    traffic = count_traffic(trace, plan, plan.group_size)
    return traffic.per_token_layer(traffic.messages)
