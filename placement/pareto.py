"""What balance costs: one plan for each of a few caps on the imbalance; `exflow place --pareto`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exflow.errors import InputError
from exflow.placement.affinity import count_affinity
from exflow.placement.place import place
from exflow.placement.plan import Plan
from exflow.placement.topology import Topology
from exflow.profiling.trace import RoutingTrace

CAPS = (1.02, 1.05, 1.1, 1.2, 1.5, None)


@dataclass(frozen=True)
class Point:
    """The plan for one cap, or why there is none."""

    max_imbalance: float | None  # None: free
    plan: Plan | None
    reason: str | None

    def figures(self) -> dict[str, Any]:
        """Ready for JSON; messages are coherent ones per token and MoE layer, all of it on the trace."""
        expected = self.plan.expected if self.plan else None
        coherent = expected["strategies"]["coherent"] if expected else {}
        imbalance = expected["imbalance"] if expected else {}
        return {
            "max_imbalance": self.max_imbalance,
            "messages_per_token_layer": coherent.get("messages_per_token_layer"),
            "imbalance_mean": imbalance.get("mean"),
            "imbalance_max": imbalance.get("max"),
            "reason": self.reason,
        }


def trade_off(
    trace: RoutingTrace,
    topology: Topology,
    max_imbalance: float | None = None,
    *,
    method: str = "auto",
    seed: int = 0,
    time_limit: float = math.inf,
    progress: Callable[[float | None], None] = lambda cap: None,
) -> list[Point]:
    """A point for each of `CAPS` and for `max_imbalance`, in ascending order, the free one last.

    Each has its own solve, and an equal share of the time limit (seconds); the trace is counted once. A cap
    that cannot be kept gives a point without a plan. `progress` is told each cap as its turn comes. Raises
    InputError as `place` does for everything but such a cap.
    """
    caps = sorted({*CAPS, max_imbalance}, key=lambda cap: math.inf if cap is None else cap)
    counts = count_affinity(trace)
    share = time_limit / len(caps)
    points: list[Point] = []
    for cap in reversed(caps):  # free first: what is wrong with the input shows there
        progress(cap)
        try:
            plan = place(
                trace,
                topology,
                method=method,
                seed=seed,
                time_limit=share,
                max_imbalance=cap,
                counts=counts,
            )
        except InputError as error:
            if cap is None or not cap >= 1:
                raise
            points.append(Point(cap, None, str(error)))
        else:
            points.append(Point(cap, plan, None))
    return points[::-1]
