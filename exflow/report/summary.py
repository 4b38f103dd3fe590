"""The first things to read: what was recorded, which plans there are, and what each strategy moves."""

from collections.abc import Sequence
from html import escape

from exflow.report.data import Judged, Report
from exflow.report.draw.figure import number, percent
from exflow.report.glossary import term

Cells = Sequence[str]


def facts(report: Report) -> str:
    """The trace and its model."""
    about = report.about
    counts = sorted(set(about.experts_per_layer))
    experts = f"{about.num_experts}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    phases = [
        f"{count:,} {name}"
        for name, count in (("prefill", about.prefill_tokens), ("decode", about.decode_tokens))
        if count
    ]
    entries = (
        ("Model", escape(about.model or "not named")),
        ("Tokens", f"{about.tokens:,}"),
        (term("sequence", "Sequences"), f"{about.sequences:,}"),
        (term("phase", "Phases"), ", ".join(phases)),
        (term("MoE layer", "MoE layers"), f"{len(about.moe_layer_ids)} of {about.num_hidden_layers}"),
        (term("expert", "Experts a layer"), experts),
        (term("top_k"), str(about.top_k)),
        ("Trace", f"<code>{about.digest[:12]}</code>"),
    )
    return (
        '<dl class="facts">' + "".join(f"<div><dt>{a}</dt><dd>{b}</dd></div>" for a, b in entries) + "</dl>"
    )


def plans_table(report: Report) -> str:
    headings = (
        "plan",
        "method",
        "GPUs",
        "made for",
        term("objective"),
        term("gap"),
        "slots a layer",
        "made from",
    )
    return _table("Plans", headings, [_plan_row(each) for each in report.plans], texts=1, kind="words")


def headline(report: Report) -> str:
    """A sentence a plan: its best strategy against what engines do."""
    sentences = []
    baseline: Judged | None = None
    for each in report.plans:
        if each.baseline:
            baseline = each
        elif baseline is not None:
            sentences.append(f"<li>{_against(each, baseline)}</li>")
    return f'<ul class="headline">{"".join(sentences)}</ul>' if sentences else ""


def strategies_table(report: Report) -> str:
    headings = (
        "plan",
        "strategy",
        term("message", "messages"),
        "against baseline",
        term("inside a node"),
        term("between nodes"),
        term("K/V copies"),
        term("exchanges a step"),
        term("local fraction"),
        term("imbalance"),
        term("owners' imbalance"),
    )
    rows = []
    usual = 0.0
    for each in report.plans:
        if each.baseline:
            usual = each.figures["strategies"]["dispatch_combine"]["messages_per_token_layer"]
        rows += [_strategy_row(each, name, usual) for name in each.figures["strategies"]]
    return _table("Traffic and balance of each plan and strategy", headings, rows, texts=2)


def _strategy_row(each: Judged, name: str, usual: float) -> Cells:
    figures = each.figures["strategies"][name]
    messages = figures["messages_per_token_layer"]
    sends = name != "replicated"
    against = percent(messages / usual - 1) if sends and usual else ""
    if each.baseline and name == "dispatch_combine":
        against = "baseline"
    shown = name.replace("_", "-")
    own = " <small>(made for it)</small>" if name == each.own and not each.baseline else ""
    return (
        escape(each.name),
        term(shown) + own,
        f"<strong>{number(float(messages))}</strong>" if sends else "none",
        against,
        *(number(float(figures[key])) for key in ("intra_node", "inter_node", "kv_copies")),
        str(figures["exchanges_per_step"]) + ("" if sends else " all-reduces"),
        number(each.figures["local_fraction"]),
        number(figures["imbalance"]["mean"]),
        number(figures["owner_imbalance"]["mean"]),
    )


def _plan_row(each: Judged) -> Cells:
    plan = each.plan
    gap = "" if plan.gap is None else "0, proven optimal" if plan.optimal else f"{plan.gap:.1%}"
    made_from = (
        "this trace" if each.on_its_own_trace else "another trace" if plan.trace_digest else "not known"
    )
    return (
        escape(each.name),
        escape(plan.method),
        escape(str(plan.topology).replace("ranks", "GPUs")),
        term(plan.strategy),
        "" if plan.objective is None else number(plan.objective),
        gap,
        f"{plan.num_slots} for {plan.num_experts} experts",
        "" if each.baseline else made_from,
    )


def _against(each: Judged, baseline: Judged) -> str:
    own = each.figures["strategies"][each.own]["messages_per_token_layer"]
    usual = baseline.figures["strategies"]["dispatch_combine"]["messages_per_token_layer"]
    share = (
        f"{abs(1 - own / usual):.0%} {'fewer' if own <= usual else 'more'} messages" if usual else "messages"
    )
    return (
        f"<strong>{escape(each.name)}</strong>, {term(each.plan.strategy)}: <strong>{share}</strong> than "
        f"{term('dispatch-combine')} with {term('contiguous')} placement ({number(float(own))} against "
        f"{number(float(usual))} a token and layer); {each.figures['local_fraction']:.0%} of the "
        f"transitions stay on a GPU, before {baseline.figures['local_fraction']:.0%}."
    )


def _table(caption: str, headings: Cells, rows: Sequence[Cells], texts: int, kind: str = "") -> str:
    """Cells are HTML; a plan's rows stand together under one name."""
    head = "".join(
        f'<th scope="col"{" class=name" if place < texts else ""}>{heading}</th>'
        for place, heading in enumerate(headings)
    )
    body, before = [], None
    for row in rows:
        first = ' class="first"' if row[0] != before else ""
        names = "".join(f'<th scope="row">{cell}</th>' for cell in row[:texts])
        body.append(f"<tr{first}>{names}{''.join(f'<td>{cell}</td>' for cell in row[texts:])}</tr>")
        before = row[0]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table '
        f'class="{kind}"><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
