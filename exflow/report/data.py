"""Data of a report. It is counted once, drawn by the other modules and printed by `--json`.

Shapes: L MoE layers, E experts, G ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from exflow.errors import InputError
from exflow.placement.counts.affinity import AffinityCounts, count_affinity
from exflow.placement.fastest_plan import comparison, references
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.serving import Serving
from exflow.placement.traffic.evaluate import evaluate
from exflow.placement.traffic.step_time import StepTime as MoeTime
from exflow.placement.traffic.step_time import step_time
from exflow.placement.traffic.traffic import local_fraction
from exflow.profiling.trace import DECODE, RoutingTrace
from exflow.report.certainty import Point, certainty
from exflow.report.counts import Counts, count
from exflow.report.followers import followers
from exflow.report.plans import Candidate

if TYPE_CHECKING:
    from exflow.cost.machines import Setting, StepTime  # with torch, which only a prediction needs

Tell = Callable[[str], None]


@dataclass(frozen=True)
class About:
    """Facts about the trace and its model."""

    model: str
    tokens: int
    sequences: int
    prefill_tokens: int
    decode_tokens: int
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    experts_per_layer: tuple[int, ...]
    top_k: int
    digest: str


@dataclass(frozen=True, eq=False)
class Judged:
    """A plan with its figures on the trace."""

    name: str
    slug: str
    plan: Plan
    baseline: bool
    on_its_own_trace: bool
    figures: dict[str, Any]  # of placement.evaluate
    local: tuple[float, ...]  # [L-1] share of the transitions that stay on a rank
    counts: dict[str, Counts]  # by strategy, of those that send messages
    points: tuple[Point, ...]
    serving: Serving
    time: dict[str, Any]  # of fastest_plan.compared, under `serving`
    times: "tuple[StepTime, ...]"

    @property
    def own(self) -> str:
        """Key of the strategy that the plan was made for."""
        return self.plan.strategy.key


@dataclass(frozen=True, eq=False)
class Report:
    about: About
    affinity: AffinityCounts
    plans: tuple[Judged, ...]
    setting: "Setting | None"

    def as_json(self) -> dict[str, Any]:
        """Data ready for JSON. Affinity is reduced to each expert's likeliest follower."""
        return {
            "trace": asdict(self.about) | {"load": self.affinity.load.tolist()},
            "followers": [asdict(each) for each in followers(self.affinity, most=1)],
            "plans": [_plan_json(each) for each in self.plans],
            "setting": None if self.setting is None else self.setting.as_json(),
        }


def gather(
    trace: RoutingTrace,
    chosen: Sequence[Candidate],
    servings: Sequence[Serving],
    setting: "Setting | None",
    tell: Tell,
    advance: Callable[[], None],
) -> Report:
    """Count everything. Raises InputError if the trace is empty.

    servings: the settings of the plans' predicted times. tell: called with the name of the next thing to
    count; advance: called `2 + len(chosen)` times.
    """
    if not trace.num_tokens:
        raise InputError("the trace has no tokens to report on; choose one that has")
    tell("affinity")
    affinity = count_affinity(trace)
    advance()
    about = _about(trace)
    advance()
    judged, times = [], _Times(trace)
    for each, serving in zip(chosen, servings, strict=True):
        tell(each.name)
        judged.append(_judge(each, trace, about.digest, serving, times, setting))
        advance()
    return Report(about, affinity, tuple(judged), setting)


def _about(trace: RoutingTrace) -> About:
    decoded = int((trace.phase == DECODE).sum())
    return About(
        model=trace.model,
        tokens=trace.num_tokens,
        sequences=len(np.unique(trace.sequence)),
        prefill_tokens=trace.num_tokens - decoded,
        decode_tokens=decoded,
        num_hidden_layers=trace.num_hidden_layers,
        moe_layer_ids=trace.moe_layer_ids,
        num_experts=trace.num_experts,
        experts_per_layer=trace.experts_per_layer,
        top_k=trace.top_k,
        digest=trace.digest(),
    )


def _judge(
    each: Candidate,
    trace: RoutingTrace,
    digest: str,
    serving: Serving,
    times: "_Times",
    setting: "Setting | None",
) -> Judged:
    plan = each.plan
    figures = evaluate(plan, trace)
    per_node = plan.topology.gpus_per_node
    counts = {
        each.key: count(trace, plan, each.group_size(plan.num_ranks, per_node))
        for each in (Strategy.DISPATCH_COMBINE, Strategy.NODE_COHERENT, Strategy.COHERENT)
        if each.key in figures["strategies"]
    }
    for name, counted in counts.items():
        totals = figures["strategies"][name]["totals"]
        assert counted.totals == {key: totals[key] for key in counted.totals}, f"{name}: counted otherwise"
    return Judged(
        name=each.name,
        slug=each.slug,
        plan=plan,
        baseline=each.baseline,
        on_its_own_trace=plan.trace_digest == digest and not each.baseline,
        figures=figures,
        local=tuple(local_fraction(trace, plan).tolist()),
        counts=counts,
        points=certainty(plan, trace),
        serving=serving,
        time=times.of(plan, serving),
        times=() if setting is None else setting.step_times(plan, figures["strategies"], trace),
    )


@dataclass(frozen=True, eq=False)
class _Times:
    """Times of plans on `trace`. The references of a setting are timed once."""

    trace: RoutingTrace
    _references: dict[tuple[Topology, int, Serving], dict[str, MoeTime]] = field(default_factory=dict)

    def of(self, plan: Plan, serving: Serving) -> dict[str, Any]:
        """The result of `fastest_plan.compared`."""
        setting = (plan.topology, plan.num_slots, serving)
        if setting not in self._references:
            plans = references(self.trace, plan.topology, serving.strategy, plan.num_slots)
            timed = {name: step_time(each, self.trace, serving) for name, each in plans.items()}
            self._references[setting] = timed
        return comparison(step_time(plan, self.trace, serving), self._references[setting])


def _plan_json(each: Judged) -> dict[str, Any]:
    plan = each.plan
    return {
        "name": each.name,
        "strategy": plan.strategy,
        "objective": plan.objective,
        "lower_bound": plan.lower_bound,
        "gap": plan.gap,
        "optimal": plan.optimal,
        "on_its_own_trace": each.on_its_own_trace,
        **each.figures,
        "local_fraction_per_layer": each.local,
        "counts": {name: _counts_json(counts) for name, counts in each.counts.items()},
        "by_tokens": [asdict(point) for point in each.points],
        "made_for": each.serving.as_json(),
        "time": each.time,
        "predicted": [time.as_json() for time in each.times],
    }


def _counts_json(counts: Counts) -> dict[str, Any]:
    return {
        "messages_by_layer": counts.by_layer.sum(axis=1).tolist(),
        "messages_by_pair": counts.by_pair.tolist(),
        "load": counts.load.tolist(),
        "moves": counts.moves.tolist(),
    }
