"""Curves beside each other and matrices, drawn with what the report is drawn with; tables as Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from exflow.report.axes import FOOT, HIGH, LEFT, TOP, Axis, axis_of, band, curve, frame, marker
from exflow.report.draw.heatmap import Heat, Scale, heatmap, in_own_colours
from exflow.report.draw.svg import WIDTH, drawing, every, standing_alone, text

_GAP = 16.0
_TICK = 34.0  # room that a label below an axis needs


@dataclass(frozen=True)
class Series:
    """A curve: its points from left to right, and the ends of their intervals where these are known.

    colour: 0 is grey, for what others are compared with; 1 to 4
    marked: with markers, and in the legend; a control goes without
    """

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marked: bool = True


@dataclass(frozen=True)
class Panel:
    """Curves over common axes, from 0 up. `labels`: what to write at x = 0, 1, ... instead of numbers."""

    x_title: str
    y_title: str
    series: Sequence[Series]
    labels: Sequence[str] = ()
    logarithmic: bool = False


@dataclass(frozen=True, eq=False)
class Matrix:
    """values [R, C], with the names of rows and columns."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray


def curves(label: str, panels: Sequence[Panel]) -> str:
    """The content of an SVG file: panels side by side, below them the names of the curves, each once."""
    wide = (WIDTH - len(panels) * (LEFT + _GAP)) / len(panels)
    body = [_panel(each, LEFT + place * (wide + LEFT + _GAP), wide) for place, each in enumerate(panels)]
    names = {series.name: series.colour for panel in panels for series in panel.series if series.marked}
    return _file(label, TOP + HIGH + FOOT + 20 * len(names), [*body, *_legend(names, TOP + HIGH + FOOT)])


def matrices(label: str, row_title: str, column_title: str, unit: str, shown: Sequence[Matrix]) -> str:
    """The content of an SVG file: the first matrix large, the others below one another beside it."""
    every_value = np.concatenate([each.values.ravel() for each in shown])
    scale = Scale(float(every_value.min()), float(every_value.max()), unit)
    places = [(110.0, 28.0, 470.0, 440.0)]
    cells = sum(len(each.rows) for each in shown[1:])
    y, left = 28.0, 440.0 - 84.0 * max(len(shown) - 2, 0)
    for each in shown[1:]:
        places.append((700.0, y, 236.0, left * len(each.rows) / cells))
        y += places[-1][3] + 84
    body = []
    for each, (x, top, width, height) in zip(shown, places, strict=False):
        heat = Heat(each.values, each.rows, each.columns, row_title, column_title, scale, row_room=84)
        body += [text(x, top - 10, each.title, kind="strong"), heatmap(heat, x, top, width, height)]
    return _file(label, 520, body)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column holds names."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    assert {len(line) for line in lines} == {len(headings)}
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def span(bounds: dict[str, float], digits: int = 3) -> str:
    """A figure and its interval, where it has a width."""
    value, low, high = (f"{bounds[name]:.{digits}f}" for name in ("value", "low", "high"))
    return value if bounds["low"] == bounds["high"] else f"{value} ({low} to {high})"


def _panel(panel: Panel, left: float, wide: float) -> str:
    every_x = [x for series in panel.series for x in series.x]
    every_y = [0.0, *(y for series in panel.series for y in (*series.y, *series.low, *series.high))]
    x, y = _x_axis(panel, every_x, left, left + wide), axis_of(every_y, TOP + HIGH, TOP)
    parts = [frame(x, y, panel.x_title, panel.y_title)]
    parts += [
        text(x.at(place), y.start + 16, panel.labels[place], anchor="middle", kind="small")
        for place in every(panel.labels, wide, _TICK)
    ]
    for each in panel.series:
        places = [(x.at(at), y.at(value)) for at, value in zip(each.x, each.y, strict=True)]
        if each.low:
            lower, upper = (
                [(x.at(at), y.at(value)) for at, value in zip(each.x, ends, strict=True)]
                for ends in (each.low, each.high)
            )
            parts.append(band(lower, upper, each.colour))
        parts.append(curve(places, each.colour))
        parts += [
            marker(place, each.colour, f"{each.name}: {value:.4g}")
            for place, value in zip(places, each.y, strict=True)
            if each.marked
        ]
    return "".join(parts)


def _x_axis(panel: Panel, values: Sequence[float], start: float, end: float) -> Axis:
    if panel.labels:
        return Axis(-0.5, len(panel.labels) - 0.5, start, end, ())
    if panel.logarithmic:
        doublings = np.arange(np.ceil(np.log2(min(values) / 1000)), np.log2(max(values) / 1000) + 0.1)
        marks = (1000 * 2**doublings).tolist()
        return Axis(min(values) / 1.15, max(values) * 1.15, start, end, marks, logarithmic=True)
    return axis_of(values, start, end)


def _legend(names: dict[str, int], y: float) -> list[str]:
    return [
        marker((LEFT + 6, y + 20 * row - 4), colour) + text(LEFT + 20, y + 20 * row, name)
        for row, (name, colour) in enumerate(names.items())
    ]


def _file(label: str, height: float, body: Sequence[str]) -> str:
    return standing_alone(in_own_colours(drawing(height, label, body)))
