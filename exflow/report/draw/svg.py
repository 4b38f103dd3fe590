"""Drawing: a few shapes as SVG text, axes, and a drawing that stands alone or in the page."""

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

from exflow.report.draw.colours import LIGHT
from exflow.report.static import content

WIDTH = 960  # of every drawing, in its own units; the page scales it

# What drawings need; the page has it once, a drawing in a file of its own carries it along.
STYLE = content("drawing.css")


def drawing(height: float, label: str, body: Iterable[str]) -> str:
    """`label` is what a screen reader says of it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def standing_alone(svg: str) -> str:
    """Make a file of a drawing: light, with its colours written out, as not every program knows variables."""
    style = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: LIGHT[found[1]], STYLE)
    opening, rest = svg.split(">", 1)
    return (
        f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="{LIGHT["surface"]}"/>{rest}\n'
    )


def text(x: float, y: float, content: object, *, anchor: str = "start", kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    where = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.5g}" y="{y:.5g}"{where}{of_kind}>{escape(str(content))}</text>'


def upright(x: float, y: float, content: object) -> str:
    """Draw text from bottom to top, with its middle at x, y."""
    return (
        f'<text transform="translate({x:.5g} {y:.5g}) rotate(-90)" text-anchor="middle" class="small">'
        f"{escape(str(content))}</text>"
    )


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inside = f"><title>{escape(title)}</title></rect>" if title else "/>"
    return (
        f'<rect x="{x:.5g}" y="{y:.5g}" width="{max(width, 0):.4g}" height="{max(height, 0):.4g}" '
        f'class="{kind}"{inside}'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path d="M{x1:.5g} {y1:.5g}L{x2:.5g} {y2:.5g}" class="{kind}"/>'


def key(x: float, y: float, entries: Sequence[tuple[str, str]]) -> str:
    """Draw a legend in one row. An entry is the class of the swatch and its name."""
    parts = []
    for kind, name in entries:
        parts += [rect(x, y - 9, 10, 10, kind), text(x + 15, y, name)]
        x += 33 + 6.6 * len(name)
    return "".join(parts)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Choose round numbers from low to high with at most `most` steps between them."""
    rough = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def every(labels: Sequence[object], space: float, needed: float) -> range:
    """Indices of the labels that fit on an axis of length `space`, each `needed` long."""
    step = max(1, math.ceil(len(labels) * needed / space))
    return range(0, len(labels), step)


def short(name: str, most: int = 40) -> str:
    """Shorten a name to fit a drawing; its beginning and its end are kept."""
    return name if len(name) <= most else f"{name[: most - 13]}…{name[-12:]}"
