"""Heat maps: an image with one pixel a cell, axes, and the data with which the script shows values.

On the page images are grey and coloured by a filter, which follows light and dark; in a file of its own a
drawing has the light colours in the image.

Shapes: R rows, C columns.
"""

import json
import re
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from exflow.report.draw import png
from exflow.report.draw.colours import palette
from exflow.report.draw.svg import every, line, text, upright

_ROW, _COLUMN = 13, 26  # room that a label needs
_SHARP = 1024  # pixels a side, at least, of an image in a file of its own
_MOST_NUMBERS = 8  # ranks a side up to which cells show their number

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """Range of the values that are coloured. `kind` is "amount", or around a middle "balance" or "chance".

    open: there are values above `high`.
    """

    low: float
    high: float
    unit: str
    kind: str = "amount"
    open: bool = False


@dataclass(frozen=True, eq=False)
class Heat:
    """values [R, C], NaN where there is nothing; labels of rows and columns; cells after which to cut."""

    values: Values
    rows: Sequence[str]
    columns: Sequence[str]
    row_title: str
    column_title: str
    scale: Scale
    row_cuts: Sequence[float] = ()
    column_cuts: Sequence[float] = ()
    numbers: bool = True  # in the cells, where these are few
    row_room: float = 34  # for the labels of rows


def heatmap(heat: Heat, x: float, y: float, width: float, height: float) -> str:
    """Draw the image with its corner at x, y, and axes to the left and below."""
    rows, columns = heat.values.shape
    high, wide = height / rows, width / columns
    levels = png.levels_of(heat.values, heat.scale.low, heat.scale.high)
    parts = [
        _image(heat, levels, x, y, width, height),
        *(line(x, y + high * cut, x + width, y + high * cut, "cut") for cut in heat.row_cuts),
        *(line(x + wide * cut, y, x + wide * cut, y + height, "cut") for cut in heat.column_cuts),
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="frame"/>',
        *(
            _tick("row", row, x - 6, y + high * (row + 0.5) + 4, "end", heat.rows[row])
            for row in every(heat.rows, height, _ROW)
        ),
        *(
            _tick(
                "column",
                column,
                x + wide * (column + 0.5),
                y + height + 15,
                "middle",
                brief(heat.columns[column]),
            )
            for column in every(heat.columns, width, _COLUMN)
        ),
        upright(x - heat.row_room, y + height / 2, heat.row_title),
        text(x + width / 2, y + height + 32, heat.column_title, anchor="middle", kind="small"),
    ]
    if heat.numbers and max(rows, columns) <= _MOST_NUMBERS:
        parts += _numbers(heat, levels, x, y, wide, high)
    return "".join(parts)


def brief(label: str) -> str:
    """Short label that fits below a column. The page's script shortens labels in the same way."""
    return re.split("[ -]", label.replace("GPU ", "G"))[0]


def scale_bar(scale: Scale, x: float, y: float, width: float = 180) -> str:
    """Draw the colours from low to high, with both numbers and the unit."""
    ramp = np.arange(1, 256, dtype=np.uint8)[np.newaxis]
    return (
        f'<image class="cells {scale.kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="10" '
        f'preserveAspectRatio="none" href="{png.data_uri(ramp)}"/>'
        + text(x - 6, y + 9, f"{scale.low:.3g}", anchor="end", kind="small")
        + text(
            x + width + 6,
            y + 9,
            f"{scale.high:.3g}{' or more' if scale.open else ''} {scale.unit}",
            kind="small",
        )
    )


def in_own_colours(svg: str) -> str:
    """Return the drawing with the light ramps' colours inside its images."""

    def coloured(found: re.Match[str]) -> str:
        levels = png.decode(b64decode(found["png"]))
        times = [-(-_SHARP // cells) for cells in levels.shape]  # not every program keeps the edges of pixels
        enlarged = levels.repeat(times[0], axis=0).repeat(times[1], axis=1)
        return found["before"] + png.data_uri(enlarged, palette(f"{found['kind']}-light"))

    return re.sub(
        r'(?P<before><image class="cells (?P<kind>[a-z]+)"[^>]*? href=")data:image/png;base64,(?P<png>[^"]+)',
        coloured,
        svg,
    )


def _image(heat: Heat, levels: png.Levels, x: float, y: float, width: float, height: float) -> str:
    scale = heat.scale
    told = {
        "rows": heat.rows,
        "columns": heat.columns,
        "row": heat.row_title,
        "column": heat.column_title,
        "low": scale.low,
        "high": scale.high,
        "unit": scale.unit,
    }
    return (
        f'<image class="cells {scale.kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'preserveAspectRatio="none" data-heat="{escape(json.dumps(told, separators=(",", ":")))}" '
        f'href="{png.data_uri(levels)}"/>'
    )


def _tick(axis: str, place: int, x: float, y: float, anchor: str, label: str) -> str:
    """Draw a label that the script can find."""
    return (
        f'<text class="small" data-{axis}="{place}" x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}">'
        f"{escape(label)}</text>"
    )


def _numbers(heat: Heat, levels: png.Levels, x: float, y: float, wide: float, high: float) -> list[str]:
    return [
        text(
            x + wide * (column + 0.5),
            y + high * (row + 0.5) + 4,
            f"{heat.values[row, column]:.3g}",
            anchor="middle",
            kind="hot" if levels[row, column] > 160 else "cold",
        )
        for row, column in np.ndindex(*heat.values.shape)
        if levels[row, column] != png.NOTHING
    ]
