"""How sure the figures are: a plan's own strategy on more and more of the trace, with intervals."""

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
    """The plan's figures on some of the trace's sequences."""

    tokens: int
    sequences: int
    messages: Range  # per token and layer
    imbalance: Range


def certainty(plan: Plan, trace: RoutingTrace) -> tuple[Point, ...]:
    """On a sixteenth, an eighth, ... and all of the sequences, ascending; none where there are too few.

    The sequences are drawn in an order of chance, the same for every plan.
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
