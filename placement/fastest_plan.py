"""Makes the plan of least time from traces: searches for candidates, times them alike, keeps the fastest.

Experts in order and the plan by load alone are candidates, so the result is never slower than they are on the
trace that it was made from.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.counts.affinity import count_affinity
from exflow.placement.counts.load import expert_load
from exflow.placement.make_plan import Solving, is_even, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.replicas import ReplicaRule, equal_slots, with_spare
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.baselines import contiguous_plan
from exflow.placement.solve.descent import Stop
from exflow.placement.solve.layer_rounds import Tell
from exflow.placement.solve.load_only import load_only_layers
from exflow.placement.solve.objective import Objective
from exflow.placement.solve.replica_search import Start, search_for_replicas
from exflow.placement.solve.time_search import search_for_time
from exflow.placement.time.serving import Serving
from exflow.placement.traffic.evaluate import evaluate
from exflow.placement.traffic.step_time import StepTime, least_step_us, step_time
from exflow.profiling.merge import merge
from exflow.profiling.trace import RoutingTrace

PRICES = (0.3, 2.5)  # of imbalance: plans by messages that are tried beside the search for time
REFERENCES = ("contiguous", "load-only")
WITHOUT = "without replicas"
IntArray = npt.NDArray[np.integer]


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
    keep_groups: int = 1,
    method: str = "auto",
    tell: Tell = lambda what: None,
    stop: Stop = lambda: False,
) -> Plan:
    """The fastest plan found for `serving`; its method names the candidate that won.

    keep_groups: routing groups of a gate that picks groups first; their experts stay together and the groups
    in order. method: "auto", or a baseline (contiguous, random, load-only), which is then returned. stop: is
    asked before a further search begins; Ctrl-C ends the one that runs.

    Expected figures are those of `evaluate`, "made_for" (see Serving.as_json) and "time" (see `compared`);
    where redundant experts were asked for, it has "without_replicas_us" too. Raises InputError as `place`
    does, and where the groups cannot be kept.
    """
    trace = merge([traces] if isinstance(traces, RoutingTrace) else list(traces))
    _check_groups(keep_groups, trace, topology, redundant_experts, method)
    if method == "auto":
        wanted = equal_slots(trace.num_experts + redundant_experts, topology.num_ranks)
        deadline = monotonic() + time_limit
        search = _Search(trace, topology, serving, wanted, keep_groups, seed, deadline, tell, stop)
        found = {each.name: each for each in search.candidates()}
        times = {name: each.time for name, each in found.items()}
        without = found.pop(WITHOUT, None)
        kept = [each for each in found.values() if keep_groups == 1 or each.name != "load-only"]
        fastest = min(kept, key=lambda each: each.time.step_us)
        best, times_json = fastest.plan, comparison(fastest.time, times)
        if without is not None:
            times_json["without_replicas_us"] = without.time.step_us
    else:
        goal, solving = Objective(serving.strategy), Solving(method, seed)
        best = place(trace, topology, objective=goal, solving=solving, redundant_experts=redundant_experts)
        plans = references(trace, topology, serving.strategy, best.num_slots)
        times_json = compared(best, plans, trace, serving)
    made_for = serving.as_json() | ({"keep_groups": keep_groups} if keep_groups > 1 else {})
    figures = evaluate(best, trace) | {"made_for": made_for, "time": times_json}
    own, least = times_json["step_us"], least_step_us(best, trace, serving)
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
    slots = load_only_layers(expert_load(trace), trace.experts_per_layer, topology, num_slots)
    level = Plan.of_slots(slots, topology, trace, method="load-only", strategy=strategy)
    plans = (contiguous_plan(trace, topology, strategy, num_slots), level)
    return dict(zip(REFERENCES, plans, strict=True))


def _check_groups(
    groups: int, trace: RoutingTrace, topology: Topology, redundant_experts: int, method: str
) -> None:
    if groups == 1:
        return
    if groups < 1 or any(count % groups for count in trace.experts_per_layer):
        raise InputError(
            f"keep groups {groups}: does not divide the {trace.num_experts} experts of a layer; give the "
            "number of routing groups of the gate (n_group)"
        )
    if redundant_experts or not is_even(trace, topology):
        raise InputError(
            f"keep groups {groups}: groups stay in order only without replicas; leave out the redundant "
            f"experts, and give a number of GPUs that divides {trace.num_experts}"
        )
    if method not in ("auto", "contiguous"):
        raise InputError(f"keep groups {groups}: method {method} does not keep groups; leave the method out")


@dataclass(frozen=True, eq=False)
class _Search:
    """Finds plans with `num_slots` slots a layer until `deadline` (of `monotonic`)."""

    trace: RoutingTrace
    topology: Topology
    serving: Serving
    num_slots: int
    keep_groups: int
    seed: int
    deadline: float
    tell: Tell
    stop: Stop

    def candidates(self) -> Iterator[Candidate]:
        """Yield the references, then what the searches find; after Ctrl-C none begins any more."""
        began = monotonic()
        basics = references(self.trace, self.topology, self.serving.strategy, self.num_slots)
        for name, plan in basics.items():
            yield self._judged(name, plan)
        # to judge what is found takes about twice as long
        timed = replace(self, deadline=self.deadline - 2 * (monotonic() - began))
        at_home = self.serving.strategy == Strategy.DISPATCH_COMBINE
        share = 0.9 if at_home else 0.5
        starts = [Start(plan.physical_to_logical_map) for plan in basics.values()]
        if is_even(self.trace, self.topology):
            yield from timed._by_swaps(basics, starts, share)
        if not self.stop() and self.num_slots > min(self.trace.experts_per_layer):
            yield timed._by_replicas(starts, share)
        if not at_home and self.keep_groups == 1:
            yield from timed._by_messages()

    def _by_swaps(self, basics: dict[str, Plan], starts: list[Start], share: float) -> Iterator[Candidate]:
        """Search with one slot for each expert. A start is added: the plan found, its spare slots filled."""
        has_replicas = self.num_slots > self.trace.num_experts
        in_order = has_replicas or self.keep_groups > 1
        found = search_for_time(
            self.trace,
            self.topology,
            self.serving,
            [self._one_each] if in_order else [plan.rank_of_expert for plan in basics.values()],
            keep_groups=self.keep_groups,
            seed=self.seed,
            time_limit=self._left(share / 2 if has_replicas else share),
            tell=self.tell,
        )
        filled = self._spare_filled(found)
        starts.append(filled)
        if has_replicas:
            known: dict[str, Any] = {"method": "time", "strategy": self.serving.strategy}
            yield self._judged(WITHOUT, Plan.from_ranks(found, self.topology, self.trace, **known))
        yield self._judged("time", self._plan(filled.slots, filled.serving_rank))

    def _by_replicas(self, starts: list[Start], share: float) -> Candidate:
        found = search_for_replicas(
            self.trace,
            self.topology,
            self.serving,
            starts,
            seed=self.seed,
            time_limit=self._left(share),
            tell=self.tell,
        )
        return self._judged("replicas", self._plan(found.slots, found.serving_rank))

    def _by_messages(self) -> Iterator[Candidate]:
        counts = [count_affinity(self.trace)]
        for tried, price in enumerate(PRICES):
            if self.stop():
                return
            left = self._left(0.85 / (len(PRICES) - tried))
            plan = place(
                self.trace,
                self.topology,
                objective=Objective(self.serving.strategy, balance_price=price),
                solving=Solving("auto", self.seed, max(0.1, left), stop=self.stop),
                redundant_experts=self.num_slots - self.trace.num_experts,
                counts=counts,
            )
            yield self._judged(f"messages, balance price {price:g}", plan)

    def _judged(self, name: str, plan: Plan) -> Candidate:
        time = step_time(plan, self.trace, self.serving)
        self.tell(f"{name}: {time.step_us:,.0f} us")
        return Candidate(name, plan, time)

    def _left(self, share: float) -> float:
        """Share of the seconds left."""
        return share * (self.deadline - monotonic())

    @property
    def _one_each(self) -> npt.NDArray[np.int64]:
        """[L, E]: the rank of each expert, in order."""
        experts, ranks = self.trace.num_experts, self.topology.num_ranks
        return np.tile(np.arange(experts) // (experts // ranks), (self.trace.num_layers, 1))

    def _spare_filled(self, assignment: IntArray) -> Start:
        """The assignment [L, E], with the experts that are chosen most in the spare slots of each rank."""
        ranks = self.topology.num_ranks
        hottest = np.argsort(-expert_load(self.trace), axis=1, kind="stable")
        slots = [
            with_spare(row, np.tile(order, (ranks, 1)), self.num_slots // ranks).ravel()
            for row, order in zip(assignment, hottest, strict=True)
        ]
        everyone = np.repeat(assignment[..., None], ranks, axis=2)
        return Start(np.stack(slots), everyone if self.serving.rule == ReplicaRule.TABLE else None)

    def _plan(self, slots: IntArray, serving_rank: IntArray | None) -> Plan:
        has_replicas = slots.shape[1] > self.trace.num_experts
        return Plan.of_slots(
            slots,
            self.topology,
            self.trace,
            method="time",
            strategy=self.serving.strategy,
            serving_rank=serving_rank if has_replicas else None,
        )
