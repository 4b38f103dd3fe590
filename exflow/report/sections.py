"""Sections of the page, and the data that their templates get beside the report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from exflow.report import affinity, curves, experts, routes, steps, summary, times, traffic
from exflow.report.data import Report
from exflow.report.draw.figure import Figure


@dataclass(frozen=True)
class Section:
    """A section. `name` names its template and its anchor; --figures writes its `figures`."""

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)


def sections(report: Report) -> list[Section]:
    """Make the sections that the report has data for, in order."""
    always: list[Callable[[Report], Section | None]] = [_about, _experts, _affinities]
    of_plans = [_gpus, _traffic, _pairs, _routes, _certainty, _steps]
    chosen = [_about, _strategies, _times, _experts, _affinities, *of_plans] if report.plans else always
    return [section for section in (make(report) for make in chosen) if section is not None]


def _about(report: Report) -> Section:
    return Section("about", "What this is", told={"phases": summary.phases(report.about)})


def _strategies(report: Report) -> Section:
    told = {
        "comparisons": summary.comparisons(report),
        "coherence": summary.coherence(report),
        "plans": summary.strategy_rows(report),
    }
    return Section("strategies", "What each strategy moves", told=told)


def _times(report: Report) -> Section:
    return Section("times", "Time of the MoE layers, predicted", told={"tables": times.time_tables(report)})


def _experts(report: Report) -> Section:
    return Section("experts", "Load of each expert", (experts.expert_load(report),))


def _affinities(report: Report) -> Section | None:
    made = affinity.affinity_figures(report)
    if made is None:
        return None
    local = [curves.local_transitions(report)] if report.plans else []
    told = {"affinity": made, "local": local}
    return Section("affinities", "Which expert follows which", (*made.figures, *local), told)


def _gpus(report: Report) -> Section:
    high = max(float(abs(experts.balance(each) - 1).max()) for each in report.plans) + 1
    made = tuple(experts.gpu_load(each, report, high) for each in report.plans)
    return Section("gpus", "Load of each GPU", made)


def _traffic(report: Report) -> Section:
    high = traffic.most_per_layer(report)
    names = [name for name in traffic.STRATEGIES if any(name in each.counts for each in report.plans)]
    made = tuple(traffic.per_layer(name, report, high) for name in names)
    return Section("traffic", "Messages layer by layer", made)


def _pairs(report: Report) -> Section:
    high = traffic.most_by_pair(report)
    made = tuple(traffic.by_pair(each, report, high) for each in report.plans)
    panels = [(each.name, [figure]) for each, figure in zip(report.plans, made, strict=True)]
    return Section("pairs", "From GPU to GPU", made, {"panels": panels})


def _routes(report: Report) -> Section:
    names = experts.layer_names(report)
    panels = [
        (
            f"{names[window[0]]} to {names[window[-1]]}",
            [routes.routes(each, report, window) for each in report.plans],
        )
        for window in routes.windows(report)
    ]
    figures = tuple(figure for _, made in panels for figure in made)
    return Section("routes", "Routes of tokens", figures, {"panels": panels})


def _certainty(report: Report) -> Section:
    made = (curves.by_tokens(report), curves.trade_off(report))
    figures = tuple(figure for figure in made if figure is not None)
    return Section("certainty", "How sure is this?", figures)


def _steps(report: Report) -> Section:
    made = steps.step_figure(report)
    if made is None:
        return Section("steps", "Time of a decode step")
    told = {"assumptions": steps.assumptions(report)}
    return Section("steps", "Time of a decode step, predicted", (made,), told)
