"""Data of the first two sections: the recorded tokens, and the messages of each plan and strategy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from exflow.placement.plan.strategy import Strategy
from exflow.report.data import About, Judged, Report
from exflow.report.draw.figure import percent

_SAME = 0.005  # a change that would round to 0%


@dataclass(frozen=True)
class Change:
    """Messages per token and layer, before and after one thing is changed."""

    before: float
    after: float

    @property
    def words(self) -> str:
        """The change as the beginning of a comparison: "20% fewer messages than"."""
        if not self.before or abs(self.after / self.before - 1) < _SAME:
            return "as many messages as"
        share = abs(self.after / self.before - 1)
        return f"{share:.0%} {'fewer' if self.after < self.before else 'more'} messages than"


@dataclass(frozen=True)
class Comparison:
    """Effect of placement alone: a plan and the baseline placement, both under the plan's own strategy.

    imbalance, local  the baseline's figure, then the plan's; local is None for a plan made for
                      dispatch-combine, whose messages do not depend on it
    """

    plan: str
    strategy: str
    messages: Change
    imbalance: tuple[float, float]
    local: tuple[float, float] | None


@dataclass(frozen=True)
class Coherence:
    """Effect of coherence alone: a strategy instead of dispatch-combine, both with the baseline placement."""

    baseline: str
    strategy: str
    messages: Change


@dataclass(frozen=True)
class StrategyRow:
    """A plan under a strategy.

    against  change of the messages from those of the baseline placement under this strategy
    figures  those of placement.evaluate
    """

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
    """Number of tokens of each phase that occurs."""
    counts = (("prefill", about.prefill_tokens), ("decode", about.decode_tokens))
    return [f"{count:,} {name}" for name, count in counts if count]


def comparisons(report: Report) -> list[Comparison]:
    """One comparison for each plan that is not a baseline."""
    return [_comparison(each, baseline) for each, baseline in _with_baselines(report) if not each.baseline]


def coherence(report: Report) -> list[Coherence]:
    """One effect for each baseline and each coherent strategy that a plan beside it was made for."""
    found = {
        (baseline.name, each.plan.strategy): Change(
            _messages(baseline, Strategy.DISPATCH_COMBINE.key), _messages(baseline, each.own)
        )
        for each, baseline in _with_baselines(report)
        if not each.baseline and each.plan.strategy != Strategy.DISPATCH_COMBINE
    }
    return [Coherence(*where, messages) for where, messages in found.items()]


def strategy_rows(report: Report) -> list[list[StrategyRow]]:
    """Rows of each plan."""
    return [
        [_strategy_row(each, name, baseline) for name in each.figures["strategies"]]
        for each, baseline in _with_baselines(report)
    ]


def _with_baselines(report: Report) -> Iterator[tuple[Judged, Judged]]:
    """Yield each plan with the baseline placement on its GPUs. The first plan is a baseline."""
    baseline = report.plans[0]
    for each in report.plans:
        if each.baseline:
            baseline = each
        yield each, baseline


def _comparison(each: Judged, baseline: Judged) -> Comparison:
    own = each.own
    local = (baseline.figures["local_fraction"], each.figures["local_fraction"])
    return Comparison(
        each.name,
        each.plan.strategy,
        messages=Change(_messages(baseline, own), _messages(each, own)),
        imbalance=(_imbalance(baseline, own), _imbalance(each, own)),
        local=None if each.plan.strategy == Strategy.DISPATCH_COMBINE else local,
    )


def _strategy_row(each: Judged, name: str, baseline: Judged) -> StrategyRow:
    own = name == each.own and not each.baseline
    return StrategyRow(
        each.name,
        name.replace("_", "-"),
        own,
        _against(each, name, baseline),
        each.figures["local_fraction"],
        each.figures["strategies"][name],
    )


def _against(each: Judged, name: str, baseline: Judged) -> str:
    if name == Strategy.REPLICATED.key:
        return ""
    if each.baseline:
        return "baseline"
    usual = _messages(baseline, name)
    return percent(_messages(each, name) / usual - 1) if usual else ""


def _messages(each: Judged, strategy: str) -> float:
    return float(_figures(each, strategy)["messages_per_token_layer"])


def _imbalance(each: Judged, strategy: str) -> float:
    return float(_figures(each, strategy)["imbalance"]["mean"])


def _figures(each: Judged, strategy: str) -> dict[str, Any]:
    """Figures under a strategy. On one node node-coherent is coherent, and may be counted only as that."""
    figures: dict[str, dict[str, Any]] = each.figures["strategies"]
    return figures.get(strategy, figures[Strategy.COHERENT.key])
