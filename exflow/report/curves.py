"""Plans side by side: certainty of their figures, cost of balance, transitions that stay on a GPU."""

from collections.abc import Callable

from exflow.report.axes import (
    HIGH,
    LEFT,
    TOP,
    Axis,
    axis_of,
    band,
    colours_of,
    curve,
    frame,
    height,
    legend,
    marker,
)
from exflow.report.certainty import Point, Range
from exflow.report.data import Judged, Report
from exflow.report.draw.figure import Figure, Table, number
from exflow.report.draw.svg import WIDTH, drawing, every, line, text
from exflow.report.experts import layer_names

Which = Callable[[Point], Range]


def by_tokens(report: Report) -> Figure | None:
    """Draw messages and imbalance against the number of tokens. None with fewer than two points."""
    if max(len(each.points) for each in report.plans) < 2:
        return None
    wide = (WIDTH - 2 * LEFT - 24) / 2
    body = [
        _against_tokens(report, "messages a token and layer", lambda point: point.messages, LEFT, wide),
        _against_tokens(report, "imbalance", lambda point: point.imbalance, 2 * LEFT + wide + 16, wide),
        legend(report.plans),
    ]
    return Figure(
        "certainty",
        "How sure are these figures?",
        drawing(height(report.plans), "Messages and imbalance against the number of tokens", body),
        Table(
            ["plan", "tokens", "sequences", "messages", "from", "to", "imbalance", "from", "to"],
            [
                (each.name, point.tokens, point.sequences, *_ends(point.messages), *_ends(point.imbalance))
                for each in report.plans
                for point in each.points
            ],
            "Figures against the number of tokens, with 95% intervals",
        ),
        "Bands are 95% intervals.",
    )


def trade_off(report: Report) -> Figure | None:
    """Draw messages against imbalance, one point for each plan. None with fewer than two such points."""
    last = [(each, each.points[-1]) for each in report.plans if each.points]
    if len(last) < 2:
        return None
    messages = [value for _, point in last for value in _ends(point.messages)]
    imbalance = [value for _, point in last for value in _ends(point.imbalance)]
    x, y = axis_of(messages, LEFT, WIDTH - 24), axis_of(imbalance, TOP + HIGH, TOP)
    colours = colours_of(report.plans)
    body = [
        frame(x, y, "messages a token and layer", "imbalance"),
        *(_cross(x, y, each, point, colours[report.plans.index(each)]) for each, point in last),
        legend(report.plans),
    ]
    return Figure(
        "trade-off",
        "Messages and balance",
        drawing(height(report.plans), "Messages against imbalance, a point for each plan", body),
        Table(
            ["plan", "messages", "from", "to", "imbalance", "from", "to"],
            [(each.name, *_ends(point.messages), *_ends(point.imbalance)) for each, point in last],
            "Messages and imbalance of each plan, with 95% intervals",
        ),
        "Left is fewer messages, down is more level. Lines are 95% intervals.",
    )


def local_transitions(report: Report) -> Figure:
    """Draw the share of transitions that stay on a GPU, from layer to layer."""
    names = layer_names(report)
    places = range(len(names) - 1)
    end = WIDTH - 24
    x = Axis(0, max(len(places) - 1, 1), LEFT + 10, end, ())
    y = axis_of([0.0, *(share for each in report.plans for share in each.local)], TOP + HIGH, TOP)
    labels = [f"{names[i]}-{names[i + 1]}" for i in places]
    body = [
        frame(x, y, "layers", "share that stays on a GPU"),
        *(
            text(x.at(i), y.start + 16, labels[i], anchor="middle", kind="small")
            for i in every(labels, end - LEFT, 46)
        ),
    ]
    for each, colour in zip(report.plans, colours_of(report.plans), strict=True):
        points = [(x.at(i), y.at(share)) for i, share in enumerate(each.local)]
        body += [curve(points, colour)]
        body += [
            marker(point, colour, f"{each.name}, layers {label}: {share:.1%}")
            for point, label, share in zip(points, labels, each.local, strict=True)
        ]
    return Figure(
        "local",
        "Transitions that stay on a GPU",
        drawing(
            height(report.plans), "Share of transitions that stay on a GPU", [*body, legend(report.plans)]
        ),
        Table(
            ["layers", *(each.name for each in report.plans)],
            [(label, *(each.local[i] for each in report.plans)) for i, label in enumerate(labels)],
            "Share of the transitions between first choices that stay on a GPU",
        ),
    )


def _against_tokens(report: Report, name: str, which: Which, left: float, wide: float) -> str:
    sizes = sorted({point.tokens for each in report.plans for point in each.points})
    x = Axis(sizes[0] / 1.15, sizes[-1] * 1.15, left, left + wide, sizes, logarithmic=True)
    y = axis_of(
        [value for each in report.plans for point in each.points for value in _ends(which(point))],
        TOP + HIGH,
        TOP,
    )
    parts = [frame(x, y, "tokens", name)]
    for each, colour in zip(report.plans, colours_of(report.plans), strict=True):
        if not each.points:
            continue
        middle, lower, upper = (
            [(x.at(point.tokens), y.at(value)) for point, value in zip(each.points, values, strict=True)]
            for values in zip(*(_ends(which(point)) for point in each.points), strict=True)
        )
        parts += [band(lower, upper, colour), curve(middle, colour)]
        parts += [
            marker(place, colour, f"{each.name}, {point.tokens:,} tokens: {number(which(point).value)}")
            for place, point in zip(middle, each.points, strict=True)
        ]
    return "".join(parts)


def _cross(x: Axis, y: Axis, each: Judged, point: Point, colour: int) -> str:
    at, left, right = (x.at(value) for value in _ends(point.messages))
    high, low, top = (y.at(value) for value in _ends(point.imbalance))
    return (
        line(left, high, right, high, f"line s{colour}")
        + line(at, low, at, top, f"line s{colour}")
        + marker((at, high), colour, f"{each.name}: {number(point.messages.value)} messages")
    )


def _ends(each: Range) -> tuple[float, float, float]:
    return each.value, each.low, each.high
