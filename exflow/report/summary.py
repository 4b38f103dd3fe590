"""The first things to read: what was recorded, and what each strategy moves, as data for their templates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from exflow.report.data import About, Judged, Report
from exflow.report.draw.figure import percent


@dataclass(frozen=True)
class Comparison:
    """A plan's best strategy against what engines do, in messages per token and layer."""

    plan: str
    strategy: str
    messages: float
    usual_messages: float
    local: float
    usual_local: float

    @property
    def change(self) -> str:
        if not self.usual_messages:
            return "messages"
        share = abs(1 - self.messages / self.usual_messages)
        return f"{share:.0%} {'fewer' if self.messages <= self.usual_messages else 'more'} messages"


@dataclass(frozen=True)
class StrategyRow:
    """A plan under a strategy; `figures` are of placement.evaluate, `against` is the baseline's messages."""

    plan: str
    strategy: str
    own: bool  # the plan was made for it
    against: str
    local: float
    figures: dict[str, Any]

    @property
    def sends(self) -> bool:
        return self.strategy != "replicated"


def phases(about: About) -> list[str]:
    """The tokens of each phase that there are."""
    counts = (("prefill", about.prefill_tokens), ("decode", about.decode_tokens))
    return [f"{count:,} {name}" for name, count in counts if count]


def comparisons(report: Report) -> list[Comparison]:
    return [
        Comparison(
            each.name,
            each.plan.strategy,
            _messages(each, each.own),
            _messages(baseline, "dispatch_combine"),
            each.figures["local_fraction"],
            baseline.figures["local_fraction"],
        )
        for each, baseline in _with_baselines(report)
        if not each.baseline
    ]


def strategy_rows(report: Report) -> list[list[StrategyRow]]:
    """The rows of each plan."""
    return [
        [_strategy_row(each, name, baseline) for name in each.figures["strategies"]]
        for each, baseline in _with_baselines(report)
    ]


def _with_baselines(report: Report) -> Iterator[tuple[Judged, Judged]]:
    """Each plan and the baseline before it; the first plan is one."""
    baseline = report.plans[0]
    for each in report.plans:
        if each.baseline:
            baseline = each
        yield each, baseline


def _strategy_row(each: Judged, name: str, baseline: Judged) -> StrategyRow:
    usual = _messages(baseline, "dispatch_combine")
    against = percent(_messages(each, name) / usual - 1) if name != "replicated" and usual else ""
    if each.baseline and name == "dispatch_combine":
        against = "baseline"
    own = name == each.own and not each.baseline
    figures = each.figures["strategies"][name]
    return StrategyRow(
        each.name, name.replace("_", "-"), own, against, each.figures["local_fraction"], figures
    )


def _messages(each: Judged, strategy: str) -> float:
    return float(each.figures["strategies"][strategy]["messages_per_token_layer"])
