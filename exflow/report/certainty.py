"""Certainty of the figures: a plan's own strategy on growing parts of the trace, with intervals."""

from dataclasses import dataclass

import numpy as np

from exflow.placement.plan.plan import Plan
from exflow.placement.traffic.confidence import interval
from exflow.profiling.merge import of_sequences
from exflow.profiling.trace import RoutingTrace

_POINTS = 6
_FEWEST = 8  # sequences: from fewer, an interval says little


@dataclass(frozen=True)
class Range:
    """A figure and the ends of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """Figures of the plan on some of the trace's sequences."""

    tokens: int
    sequences: int
    messages: Range  # per token and layer
    imbalance: Range


def certainty(plan: Plan, trace: RoutingTrace) -> tuple[Point, ...]:
    """Judge the plan on 1/32, 1/16, ... and all of the sequences. Parts with too few sequences are left out.

    The sequences are drawn in a random order, which is the same for every plan.
    """
    order = np.random.default_rng(0).permutation(len(np.unique(trace.sequence)))
    sizes = [len(order) >> halvings for halvings in reversed(range(_POINTS))]
    return tuple(
        _point(plan, trace if size == len(order) else of_sequences(trace, order[:size]), size)
        for size in sizes
        if size >= _FEWEST
    )


def _point(plan: Plan, part: RoutingTrace, sequences: int) -> Point:
    figures = interval(plan, part)
    return Point(
        part.num_tokens,
        sequences,
        Range(**figures["messages_per_token_layer"]),
        Range(**figures["imbalance"]),
    )
