"""Spreads owners over the ranks: a token's next owner is chosen by affinity and by how busy the ranks are.

By affinity alone the tokens of a coherence group gather where popular experts live, and the rank that owns
most of them attends most and sends most: all others wait for it. Only a token with several experts leaves a
choice.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from exflow.placement.plan.plan import Plan
from exflow.placement.traffic.traffic import follow, imbalance_of, total
from exflow.profiling.trace import RoutingTrace

_STEPS = (300, 200, 150, 120, 100, 85, 75, 65)  # per mille of `next_owner`, for a rank that owns nothing


def balance_owners(plan: Plan, trace: RoutingTrace, price: float) -> Plan:
    """The plan with the `next_owner` table of least cost: messages plus the price of the owners' imbalance.

    price: messages per token and layer that a unit of imbalance (busiest owner's tokens / mean) is worth.
    Every rank has a handicap in each layer, added to all its scores; it grows while the rank owns less than
    the mean of the trace, and shrinks while it owns more. The plan itself is among those to choose from.
    """
    assert plan.next_owner is not None
    if plan.group_size == 1:
        return plan
    scores = plan.next_owner.astype(np.float64)
    handicap = np.zeros((plan.num_layers, 1, plan.num_ranks))
    cost, share = _judged(plan, trace, price)
    best, cheapest = plan, cost
    for step in _STEPS:
        handicap += step * (1 - share * plan.num_ranks)[:, None, :]
        tried = replace(plan, next_owner=_per_mille(scores + handicap - handicap.min(axis=2, keepdims=True)))
        cost, share = _judged(tried, trace, price)
        if cost < cheapest:
            best, cheapest = tried, cost
    return best


def _judged(plan: Plan, trace: RoutingTrace, price: float) -> tuple[float, npt.NDArray[np.float64]]:
    """Cost of the plan, and the share of the tokens that each rank owns after each MoE layer [L, G]."""
    followed = follow(trace, plan, plan.group_size)
    traffic, owned = total(followed, plan, plan.group_size), followed.owned[1:]
    level = float(imbalance_of(owned).mean())
    return traffic.per_token_layer(traffic.messages) + price * level, owned / trace.num_tokens


def _per_mille(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.int16]:
    """[L, E, G] with 1000 as each layer's largest: only the order of sums within a layer matters."""
    largest = np.maximum(scores.max(axis=(1, 2), keepdims=True), 1)
    table: npt.NDArray[np.int16] = np.rint(scores * (1000 / largest)).astype(np.int16)
    return table
