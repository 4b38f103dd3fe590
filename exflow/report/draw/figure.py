"""A figure of the page: a drawing, what it shows in words, and its numbers as a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from exflow.report.draw.heatmap import in_own_colours
from exflow.report.draw.svg import standing_alone

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Figure:
    """`slug` names it in files and links; `svg` may be left out, then the table is all there is."""

    slug: str
    title: str
    svg: str
    table: str
    caption: str = ""

    def file(self) -> str:
        """The drawing as the content of an SVG file."""
        return standing_alone(in_own_colours(self.svg))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], caption: str, texts: int = 1) -> str:
    """The first `texts` columns hold names, the others numbers; `caption` is for screen readers."""
    head = "".join(
        f'<th scope="col"{" class=name" if place < texts else ""}>{escape(heading)}</th>'
        for place, heading in enumerate(headings)
    )
    body = "".join(f"<tr>{_cells(row, texts)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def number(value: float) -> str:
    """Four significant digits, large numbers whole, with a true minus sign."""
    shown = f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return shown.replace("-", MINUS) if "e" not in shown else f"{value:.2e}"


def percent(share: float) -> str:
    """A change, with its sign."""
    return f"{share:+.0%}".replace("-", MINUS)


def _cells(row: Sequence[object], texts: int) -> str:
    return "".join(
        f'<th scope="row">{escape(_shown(cell))}</th>'
        if place < texts
        else f"<td>{escape(_shown(cell))}</td>"
        for place, cell in enumerate(row)
    )


def _shown(cell: object) -> str:
    return number(cell) if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)
