"""A figure of the page: a drawing, its description in words, and its numbers as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from exflow.report.draw.heatmap import in_own_colours
from exflow.report.draw.svg import standing_alone

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Table:
    """A table of numbers. The first `texts` columns hold names; `caption` is for screen readers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str
    texts: int = 1


@dataclass(frozen=True)
class Figure:
    """`slug` names it in files and links."""

    slug: str
    title: str
    svg: str
    table: Table
    caption: str = ""

    def file(self) -> str:
        """Content of an SVG file with the drawing."""
        return standing_alone(in_own_colours(self.svg))


def number(value: float) -> str:
    """Format with four significant digits, large numbers whole, with a true minus sign."""
    shown = f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return shown.replace("-", MINUS) if "e" not in shown else f"{value:.2e}"


def percent(share: float) -> str:
    """Format a change as a percentage with its sign."""
    return f"{share:+.0%}".replace("-", MINUS)


def cell(value: object) -> str:
    """Format a value for a cell of a table."""
    return (
        number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
