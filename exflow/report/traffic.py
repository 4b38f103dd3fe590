"""Messages: layer by layer, and from GPU to GPU."""

import numpy as np
import numpy.typing as npt

from exflow.report.data import Judged, Report
from exflow.report.draw.figure import Figure, Table
from exflow.report.draw.heatmap import Heat, Scale, heatmap, scale_bar
from exflow.report.draw.svg import WIDTH, drawing, every, key, line, rect, short, text, ticks
from exflow.report.experts import blocks, layer_names, node_cuts

STRATEGIES = {
    "dispatch_combine": "dispatch-combine",
    "node_coherent": "node-coherent",
    "coherent": "coherent",
}
_MATRICES = ("dispatch_combine", "coherent")
_MOST_COLUMNS = 3  # panels in a row
_LEFT, _GAP, _HIGH = 44, 40, 110
_MOST_RANKS = 128  # a side of a matrix in a drawing
_LARGEST_TABLE = 16  # ranks a side

Values = npt.NDArray[np.float64]


def per_layer(strategy: str, report: Report, high: float) -> Figure:
    """Draw one panel for each plan, side by side on one scale that ends at `high`."""
    plans = [each for each in report.plans if strategy in each.counts]
    columns = min(len(plans), _MOST_COLUMNS)
    wide = (WIDTH - _LEFT - _GAP * (columns - 1) - 8) / columns
    links = [("intra", "inside a node"), ("inter", "between nodes")]
    several_nodes = any(each.plan.topology.num_nodes > 1 for each in plans)
    body = [key(_LEFT, 14, links if several_nodes else links[:1])]
    for place, judged in enumerate(plans):
        x = _LEFT + place % columns * (wide + _GAP)
        y = 54 + place // columns * (_HIGH + 64)
        body.append(_panel(judged, strategy, report, high, (x, y, wide)))
    height = 54 + -(-len(plans) // columns) * (_HIGH + 64) - 14
    return Figure(
        f"traffic-{STRATEGIES[strategy]}",
        STRATEGIES[strategy],
        drawing(height, f"Messages a token in each layer under {STRATEGIES[strategy]}, a panel a plan", body),
        Table(
            ["layer", *(f"{each.name}: {link}" for each in plans for link in ("inside", "between"))],
            [
                (name, *(float(value) for each in plans for value in _messages(each, strategy)[layer]))
                for layer, name in enumerate(layer_names(report))
            ],
            f"Messages a token in each layer under {STRATEGIES[strategy]}",
        ),
    )


def most_per_layer(report: Report) -> float:
    """Most messages per token in any layer, plan and strategy."""
    return max(
        (float(_messages(each, name).sum(axis=1).max()) for each in report.plans for name in each.counts),
        default=0.0,
    )


def most_by_pair(report: Report) -> float:
    """Most messages per 1,000 tokens and layer between any pair of GPUs, in any plan."""
    return max(float(_per_thousand(each, name).max()) for each in report.plans for name in _MATRICES) or 1.0


def by_pair(judged: Judged, report: Report, high: float) -> Figure:
    """Draw messages between GPUs under dispatch-combine and coherence. The scale ends at `high`."""
    scale = Scale(0, high, "messages per 1,000 tokens and layer")
    cuts = [cut / _block_size(judged) for cut in node_cuts(judged.plan.topology)]
    side = 390.0
    body = [text(24, 14, short(judged.name), kind="strong"), scale_bar(scale, 400, 5)]
    for place, name in enumerate(_MATRICES):
        x = 70 + place * (side + 90)
        begin = [str(first) for first in blocks(judged.plan.num_ranks, _MOST_RANKS)]
        heat = Heat(_per_thousand(judged, name), begin, begin, "from GPU", "to GPU", scale, cuts, cuts)
        body += [text(x, 44, STRATEGIES[name]), heatmap(heat, x, 54, side, side)]
    return Figure(
        f"pairs-{judged.slug}",
        f"From GPU to GPU: {judged.name}",
        drawing(
            54 + side + 44,
            f"Messages from each GPU to each other one under {judged.name}, two matrices",
            body,
        ),
        _pair_table(judged, report),
    )


def _panel(
    judged: Judged, strategy: str, report: Report, high: float, place: tuple[float, float, float]
) -> str:
    x, y, wide = place
    messages = _messages(judged, strategy)
    names = layer_names(report)
    step, bottom, scale = wide / len(messages), y + _HIGH, _HIGH / (high or 1.0)
    bar = max(step - 1, 0.6 * step)
    mean = float(messages.sum(axis=1).mean())
    parts = [text(x, y - 10, f"{short(judged.name, 26)}: {mean:.3f} on average", kind="strong")]
    for value in ticks(0, high, 3):
        parts.append(line(x, bottom - value * scale, x + wide, bottom - value * scale, "grid"))
        parts.append(text(x - 5, bottom - value * scale + 4, f"{value:g}", anchor="end", kind="small"))
    for layer, (intra, inter) in enumerate(messages):
        left = x + layer * step
        title = f"layer {names[layer]}: {intra:.3f} inside a node, {inter:.3f} between nodes"
        parts.append(rect(left, bottom - intra * scale, bar, intra * scale, "intra", title))
        if inter:
            parts.append(rect(left, bottom - (intra + inter) * scale, bar, inter * scale, "inter", title))
    parts += [
        line(x, bottom - mean * scale, x + wide, bottom - mean * scale, "mean"),
        line(x, bottom, x + wide, bottom, "axis"),
        *(
            text(x + step * layer + bar / 2, bottom + 15, names[layer], anchor="middle", kind="small")
            for layer in every(names, wide, 26)
        ),
        text(x + wide / 2, bottom + 30, "layer of the model", anchor="middle", kind="small"),
    ]
    return "".join(parts)


def _messages(judged: Judged, strategy: str) -> Values:
    """[L, 2] messages per token inside a node and between nodes."""
    return np.asarray(judged.counts[strategy].by_layer.sum(axis=1) / judged.figures["tokens"])


def _per_thousand(judged: Judged, strategy: str) -> Values:
    """[G, G] messages per 1,000 tokens and layer. Very many GPUs become equal blocks with their sums."""
    begin = blocks(judged.plan.num_ranks, _MOST_RANKS)
    sums = np.add.reduceat(np.add.reduceat(judged.counts[strategy].by_pair, begin, axis=0), begin, axis=1)
    return np.asarray(1000 * sums / (judged.figures["tokens"] * judged.figures["layers"]), dtype=np.float64)


def _block_size(judged: Judged) -> int:
    return -(-judged.plan.num_ranks // _MOST_RANKS)


def _pair_table(judged: Judged, report: Report) -> Table:
    """Table of all pairs of GPUs, or of the pairs with most messages if there are too many."""
    scaled = {
        name: 1000 * judged.counts[name].by_pair / (report.about.tokens * len(report.about.moe_layer_ids))
        for name in _MATRICES
    }
    ranks = judged.plan.num_ranks
    pairs = [(one, other) for one in range(ranks) for other in range(ranks) if one != other]
    if ranks > _LARGEST_TABLE:
        pairs = sorted(pairs, key=lambda pair: -scaled[_MATRICES[0]][pair])[: _LARGEST_TABLE * 4]
    return Table(
        ["from GPU", "to GPU", *(STRATEGIES[name] for name in _MATRICES)],
        [(*pair, *(float(scaled[name][pair]) for name in _MATRICES)) for pair in pairs],
        f"Messages per 1,000 tokens and layer between GPUs under {judged.name}"
        + ("" if ranks <= _LARGEST_TABLE else "; the pairs with most, --json gives all"),
        texts=2,
    )
