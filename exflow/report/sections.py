"""The sections of the page: what each figure means, in a few words, and the controls that choose among "
"figures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from exflow.report import affinity, curves, experts, routes, steps, summary, traffic
from exflow.report.data import Report
from exflow.report.draw.figure import Figure
from exflow.report.glossary import term


@dataclass(frozen=True)
class Section:
    """`body` is HTML; `figures` are what --figures writes of it."""

    anchor: str
    title: str
    body: str
    figures: tuple[Figure, ...] = ()


def sections(report: Report) -> list[Section]:
    """Those that the report has something for, in order."""
    made = [_about(report), _experts(report), _affinity(report)]
    if report.plans:
        made[1:1] = [_strategies(report)]
        made += [
            _gpus(report),
            _traffic(report),
            _pairs(report),
            _routes(report),
            _certainty(report),
            _steps(report),
        ]
    return [section for section in made if section is not None]


def _about(report: Report) -> Section:
    said = ""
    if any(each.on_its_own_trace for each in report.plans):
        said = (
            "A plan looks better on the trace that it was made from than on new tokens: make the report from "
            "another trace of the model, or place with <code>--holdout</code>."
        )
    if not report.plans:
        said = (
            "Without a plan, and without GPUs (<code>--gpus</code> or <code>--topology</code>), there is no "
            "traffic to show."
        )
    plans = f"<h3>Plans</h3>{summary.plans_table(report)}" if report.plans else ""
    note = f'<p class="note">{said}</p>' if said else ""
    return Section("about", "What this is", summary.facts(report) + plans + note)


def _strategies(report: Report) -> Section:
    note = (
        f"Means per token and {term('MoE layer')}; {term('K/V copies')} per token and attention layer. "
        f"Against baseline: messages of {term('dispatch-combine')} with {term('contiguous')} placement on "
        "the same GPUs. Replicated sends no messages, but moves whole rows in its all-reduces."
    )
    body = f'{summary.headline(report)}{summary.strategies_table(report)}<p class="note">{note}</p>'
    return Section("strategies", "What each strategy moves", body)


def _experts(report: Report) -> Section:
    return _section("experts", "Load of each expert", [experts.expert_load(report)])


def _affinity(report: Report) -> Section | None:
    made = affinity.affinity_figures(report)
    if made is None:
        return None
    intro = (
        "Of the tokens that select the row's expert in a layer, which share selects the column's in the "
        f"next, less the share of all tokens that does ({term('affinity')}): blue is more often than by "
        "chance, red less. Sorted by a plan, its GPUs are the blocks on the diagonal; what is inside stays "
        "on a GPU."
    )
    if made.cell > 1:
        intro += (
            f" There are too many experts for the page: a cell is a block of {made.cell} by {made.cell}, "
            "the mean of its rows and the sum of its columns."
        )
    local = [curves.local_transitions(report)] if report.plans else []
    images = made.images.replace("<", "\\u003c")
    body = (
        f"<p>{intro}</p>{_affinity_choice(made)}{''.join(map(_figure, [made.figures[0], *local]))}"
        f'<script type="application/json" id="affinity-images">{images}</script>'
    )
    return Section("affinities", "Which expert follows which", body, (*made.figures, *local))


def _affinity_choice(made: affinity.Affinity) -> str:
    options = "".join(f"<option>{escape(order)}</option>" for order in made.orders)
    return (
        f'<div class="controls" id="affinity-choice"><label>Experts <select>{options}</select></label>'
        f'<label>Layers <input type="range" min="0" max="{len(made.pairs) - 1}" value="{made.first}" '
        f'data-pairs="{escape(json.dumps(made.pairs))}"></label>'
        f"<output>{escape(made.pairs[made.first])}</output></div>"
    )


def _gpus(report: Report) -> Section:
    high = max(float(abs(experts.balance(each) - 1).max()) for each in report.plans) + 1
    made = [experts.gpu_load(each, report, high) for each in report.plans]
    note = _many(report, 128, "GPUs are drawn in blocks, as means")
    return _section("gpus", "Load of each GPU", made, f"Under the strategy that the plan was made for.{note}")


def _traffic(report: Report) -> Section:
    high = traffic.most_per_layer(report)
    names = [name for name in traffic.STRATEGIES if any(name in each.counts for each in report.plans)]
    made = [traffic.per_layer(name, report, high) for name in names]
    intro = f"<p>{term('message', 'Messages')} a token in each layer, on one scale.</p>"
    body = "".join(f"<h3>{term(figure.title)}</h3>{_figure(figure)}" for figure in made)
    return Section("traffic", "Messages layer by layer", intro + body, tuple(made))


def _pairs(report: Report) -> Section:
    high = traffic.most_by_pair(report)
    made = [traffic.by_pair(each, report, high) for each in report.plans]
    intro = (
        "All layers together. The cells of a matrix add up to the messages of 1,000 tokens in a layer; "
        f"lines part nodes, where these are few.{_many(report, 128, 'GPUs are drawn in blocks, as sums')}"
    )
    panels = [(each.name, _figure(figure)) for each, figure in zip(report.plans, made, strict=True)]
    return Section(
        "pairs", "From GPU to GPU", f"<p>{intro}</p>{_chooser('pairs', 'Plan', panels)}", tuple(made)
    )


def _routes(report: Report) -> Section:
    windows = routes.windows(report)
    by_window = [[routes.routes(each, report, window) for each in report.plans] for window in windows]
    names = experts.layer_names(report)
    intro = (
        f"Where the {term('owner')} of each token is, layer by layer, when it is free to stay "
        f"({term('coherent')}). A ribbon is as wide as its tokens are many; the thinnest are left out."
        f"{_many(report, 8, 'GPUs are drawn in blocks of neighbours')}"
    )
    panels = [
        (f"{names[window[0]]} to {names[window[-1]]}", "".join(map(_figure, made)))
        for window, made in zip(windows, by_window, strict=True)
    ]
    figures = tuple(figure for made in by_window for figure in made)
    return Section(
        "routes", "Routes of tokens", f"<p>{intro}</p>{_chooser('routes', 'Layers', panels)}", figures
    )


def _certainty(report: Report) -> Section:
    made = [figure for figure in (curves.by_tokens(report), curves.trade_off(report)) if figure is not None]
    intro = (
        "Each plan under the strategy that it was made for, on more and more sequences of this trace. Where "
        f"a line still moves, or its {term('interval')} is wide, record more. The plans stay as they are: "
        "whether more tokens would make a better plan is what <code>exflow place --learning-curve</code> "
        "tells."
    )
    if not made:
        intro = "Too few sequences to tell: an interval needs eight at least."
    return _section("certainty", "How sure is this?", made, intro)


def _steps(report: Report) -> Section:
    made = steps.step_figure(report)
    if made is None:
        missing = (
            "Not predicted: that needs the model's sizes. Give <code>--model FOLDER</code>, a "
            "checkpoint or a config.json."
        )
        return _section("steps", "Time of a decode step", [], missing)
    said = "".join(f"<li>{each}</li>" for each in steps.assumptions(report))
    intro = (
        f"<p><strong>A prediction by the cost model, nothing was run.</strong> It assumes:</p><ul>{said}</ul>"
    )
    return Section("steps", "Time of a decode step, predicted", intro + _figure(made), (made,))


def _section(anchor: str, title: str, made: Sequence[Figure], intro: str = "") -> Section:
    """`intro` is HTML of one paragraph."""
    said = f"<p>{intro}</p>" if intro else ""
    return Section(anchor, title, said + "".join(map(_figure, made)), tuple(made))


def _figure(figure: Figure) -> str:
    """The drawing, and its numbers to unfold."""
    title = escape(figure.title)
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return (
        f'<figure id="fig-{figure.slug}"><div class="wide" tabindex="0" role="region" aria-label="{title}">'
        f"{figure.svg}</div>{caption}"
        f"<details><summary>Numbers: {title}</summary>{figure.table}</details></figure>"
    )


def _chooser(name: str, label: str, panels: Sequence[tuple[str, str]]) -> str:
    """Panels of which one is seen, and the list to choose it from; all are seen where scripts do not run."""
    options = "".join(f"<option>{escape(option)}</option>" for option, _ in panels)
    shown = "".join(f"<div>{panel}</div>" for _, panel in panels)
    control = f'<label>{label} <select data-panels="panels-{name}">{options}</select></label>'
    chosen = f'<div class="controls">{control}</div>' if len(panels) > 1 else ""
    return f'{chosen}<div id="panels-{name}">{shown}</div>'


def _many(report: Report, most: int, said: str) -> str:
    many = max(each.plan.num_ranks for each in report.plans) > most
    return f" With more than {most} GPUs, {said}." if many else ""
