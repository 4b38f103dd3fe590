"""Trades messages for balance: one plan for each of several prices of imbalance; `exflow place --pareto`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exflow.placement.counts.affinity import count_affinity
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.evaluate import own_figures
from exflow.profiling.trace import RoutingTrace

PRICES = (0.0, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Point:
    """The plan for one price of imbalance."""

    balance_price: float
    plan: Plan

    def figures(self) -> dict[str, Any]:
        """Figures as JSON: messages of the plan's strategy per token and MoE layer, and imbalance, on the
        trace."""
        expected = self.plan.expected
        return {
            "balance_price": self.balance_price,
            "messages_per_token_layer": own_figures(self.plan)["messages_per_token_layer"],
            "imbalance_mean": expected["imbalance"]["mean"],
            "imbalance_max": expected["imbalance"]["max"],
        }


def trade_off(
    traces: Sequence[RoutingTrace],
    topology: Topology,
    *,
    objective: Objective,
    solving: Solving,
    redundant_experts: int = 0,
    tell: Callable[[float], None] = lambda price: None,
) -> list[Point]:
    """A point for each of `PRICES` and for the objective's own price, in ascending order.

    Each has its own solve, and an equal share of the time limit (seconds); the traces are counted once.
    `tell` is told each price as its turn comes. Raises InputError as `place` does.
    """
    prices = sorted({*PRICES, objective.balance_price})
    counts = [count_affinity(trace) for trace in traces]
    share = replace(solving, time_limit=solving.time_limit / len(prices))
    points = []
    for price in prices:
        tell(price)
        plan = place(
            traces,
            topology,
            objective=replace(objective, balance_price=price),
            solving=share,
            redundant_experts=redundant_experts,
            counts=counts,
        )
        points.append(Point(price, plan))
    return points
