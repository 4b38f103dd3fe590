"""Two axes with a grid, and the markers, curves and legend of plans."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from exflow.report.data import Judged
from exflow.report.draw.colours import PLAN_COLOURS
from exflow.report.draw.svg import line, short, text, ticks, upright

LEFT, TOP, HIGH = 62.0, 24.0, 230.0  # of a drawing with axes
FOOT = 56.0  # below the axis, down to the legend
_LINE = 20.0  # of the legend
_SHAPES = (  # colours come back after a few plans, and not everyone tells them apart
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z",
    "M-5 -5H5V5H-5Z",
    "M0 -6L6 5H-6Z",
    "M0 -6L6 0L0 6L-6 0Z",
    "M0 6L6 -5H-6Z",
)

Place = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Maps values from low to high onto pixels from start to end. `marks` are the labelled values."""

    low: float
    high: float
    start: float
    end: float
    marks: Sequence[float]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        scale = math.log if self.logarithmic else float
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(value) - low) / ((high - low) or 1.0) * (self.end - self.start)


def axis_of(values: Sequence[float], start: float, end: float) -> Axis:
    """Make an axis that holds all the values, with a small margin."""
    spare = 0.06 * (max(values) - min(values)) or 0.1
    low, high = max(0.0, min(values) - spare), max(values) + spare
    return Axis(low, high, start, end, ticks(low, high))


def frame(x: Axis, y: Axis, x_title: str, y_title: str) -> str:
    """Draw grid, labels and titles."""
    parts = []
    for value in y.marks:
        parts.append(line(x.start, y.at(value), x.end, y.at(value), "grid"))
        parts.append(text(x.start - 6, y.at(value) + 4, f"{value:.4g}", anchor="end", kind="small"))
    for value in x.marks:
        label = f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
        parts.append(text(x.at(value), y.start + 16, label, anchor="middle", kind="small"))
    return "".join(parts) + (
        line(x.start, y.start, x.end, y.start, "axis")
        + text((x.start + x.end) / 2, y.start + 34, x_title, anchor="middle", kind="small")
        + upright(x.start - 46, (y.start + y.end) / 2, y_title)
    )


def colours_of(plans: Sequence[Judged]) -> list[int]:
    """Give each plan the number of its colour: 0 for baselines, the others in turn."""
    colours, others = [], 0
    for each in plans:
        others += not each.baseline
        colours.append(0 if each.baseline else 1 + (others - 1) % PLAN_COLOURS)
    return colours


def marker(place: Place, colour: int, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<path class="f{colour}" transform="translate({place[0]:.1f} {place[1]:.1f})" '
        f'd="{_SHAPES[colour]}">{inside}</path>'
    )


def curve(places: Sequence[Place], colour: int) -> str:
    return f'<path class="line s{colour}" d="{_path(places)}"/>'


def band(lower: Sequence[Place], upper: Sequence[Place], colour: int) -> str:
    return f'<path class="band f{colour}" d="{_path([*lower, *reversed(upper)])}Z"/>'


def legend(plans: Sequence[Judged]) -> str:
    """Draw one line for each plan, below the axes."""
    y = TOP + HIGH + FOOT
    return "".join(
        marker((LEFT + 6, y + _LINE * row - 4), colour)
        + text(LEFT + 20, y + _LINE * row, f"{short(each.name, 60)}, {each.plan.strategy}")
        for row, (each, colour) in enumerate(zip(plans, colours_of(plans), strict=True))
    )


def height(plans: Sequence[Judged]) -> float:
    """Height of a drawing with axes and legend."""
    return TOP + HIGH + FOOT + _LINE * len(plans)


def _path(places: Sequence[Place]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
