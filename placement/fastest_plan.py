"""Makes the plan of least time from traces: searches for candidates, times them alike, keeps the fastest.

Experts in order and the plan by load alone are candidates, so the result is never slower than they are on the
trace that it was made from.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy as np

from exflow.placement.counts.affinity import count_affinity
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.replicas import equal_slots
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.baselines import contiguous_plan
from exflow.placement.solve.load_only import load_only_layers
from exflow.placement.solve.objective import Objective
from exflow.placement.solve.time_search import search_for_time
from exflow.placement.time.serving import Serving
from exflow.placement.traffic.evaluate import evaluate
from exflow.placement.traffic.step_time import StepTime, least_step_us, step_time
from exflow.profiling.merge import merge
from exflow.profiling.trace import RoutingTrace

PRICES = (0.3, 2.5)  # of imbalance: plans by messages that are tried beside the search for time
REFERENCES = ("contiguous", "load-only")
Tell = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan, and its time on the trace that it was made from."""

    name: str
    plan: Plan
    time: StepTime


def place_for_time(
    traces: RoutingTrace | Sequence[RoutingTrace],
    topology: Topology,
    serving: Serving,
    *,
    seed: int = 0,
    time_limit: float = math.inf,
    redundant_experts: int = 0,
    method: str = "auto",
    tell: Tell = lambda what: None,
) -> Plan:
    """The fastest plan found for `serving`; its method names the candidate that won.

    method: "auto", or a baseline (contiguous, random, load-only), which is then returned.

    Expected figures are those of `evaluate`, "made_for" (see Serving.as_json) and "time" (see `compared`).
    Raises InputError as `place` does.
    """
    trace = merge([traces] if isinstance(traces, RoutingTrace) else list(traces))
    if method == "auto":
        found = list(_candidates(trace, topology, serving, seed, time_limit, redundant_experts, tell))
        fastest = min(found, key=lambda each: each.time.step_us)
        best, times = fastest.plan, comparison(fastest.time, {each.name: each.time for each in found})
    else:
        goal, solving = Objective(serving.strategy), Solving(method, seed)
        best = place(trace, topology, objective=goal, solving=solving, redundant_experts=redundant_experts)
        plans = references(trace, topology, serving.strategy, best.num_slots)
        times = compared(best, plans, trace, serving)
    figures = evaluate(best, trace) | {"made_for": serving.as_json(), "time": times}
    own, least = times["step_us"], least_step_us(best, trace, serving)
    return replace(
        best, expected=figures, objective=own, lower_bound=least, optimal=own <= least * (1 + 1e-9)
    )


def compared(plan: Plan, plans: dict[str, Plan], trace: RoutingTrace, serving: Serving) -> dict[str, Any]:
    """The `comparison` of a plan with the references `plans` on a trace."""
    times = {name: step_time(each, trace, serving) for name, each in plans.items()}
    return comparison(step_time(plan, trace, serving), times)


def comparison(own: StepTime, times: dict[str, StepTime]) -> dict[str, Any]:
    """A plan's time, ready for JSON, beside those of the references, which are among `times`."""
    return {
        **own.as_json(),
        "ratio_to_contiguous": own.step_us / times["contiguous"].step_us,
        "references": {name: times[name].as_json() for name in REFERENCES},
    }


def references(
    trace: RoutingTrace, topology: Topology, strategy: Strategy, num_slots: int
) -> dict[str, Plan]:
    """The contiguous plan and the plan by load alone, with `num_slots` slots a layer."""
    layers = range(trace.num_layers)
    load = [np.bincount(trace.experts[:, layer].ravel(), minlength=trace.num_experts) for layer in layers]
    slots = load_only_layers(np.stack(load), trace.experts_per_layer, topology, num_slots)
    level = Plan.of_slots(slots, topology, trace, method="load-only", strategy=strategy)
    plans = (contiguous_plan(trace, topology, strategy, num_slots), level)
    return dict(zip(REFERENCES, plans, strict=True))


def _candidates(
    trace: RoutingTrace,
    topology: Topology,
    serving: Serving,
    seed: int,
    time_limit: float,
    redundant_experts: int,
    tell: Tell,
) -> Iterator[Candidate]:
    began = monotonic()

    def candidate(name: str, plan: Plan) -> Candidate:
        time = step_time(plan, trace, serving)
        tell(f"{name}: {time.step_us:,.0f} us")
        return Candidate(name, plan, time)

    num_slots = equal_slots(trace.num_experts + redundant_experts, topology.num_ranks)
    basics = references(trace, topology, serving.strategy, num_slots)
    for name, plan in basics.items():
        yield candidate(name, plan)
    even = len(set(trace.experts_per_layer)) == 1 and trace.num_experts % topology.num_ranks == 0
    if even and not redundant_experts:
        starts = [plan.rank_of_expert for plan in basics.values()]
        last = serving.strategy == Strategy.DISPATCH_COMBINE
        left = (0.9 if last else 0.5) * (began + time_limit - monotonic())
        found = search_for_time(trace, topology, serving, starts, seed=seed, time_limit=left, tell=tell)
        yield candidate(
            "time",
            Plan.from_ranks(found.assignment, topology, trace, method="time", strategy=serving.strategy),
        )
        if last or found.interrupted:
            return
    counts = [count_affinity(trace)]
    for tried, price in enumerate(PRICES):
        left = max(0.1, 0.85 * (began + time_limit - monotonic()) / (len(PRICES) - tried))
        plan = place(
            trace,
            topology,
            objective=Objective(serving.strategy, balance_price=price),
            solving=Solving("auto", seed, left),
            redundant_experts=redundant_experts,
            counts=counts,
        )
        yield candidate(f"messages, balance price {price:g}", plan)
