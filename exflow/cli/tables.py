"""Results on stdout: JSON for tools, tables for people."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDEST = 1000  # characters of a row; more than any table has


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=1))


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Print one figure per line."""
    if as_json:
        print_json(figures)
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {readable(value)}")


def print_table(names: list[str], columns: dict[str, str], lines: list[dict[str, Any]]) -> None:
    """Print a row for each of `lines`: its entries `names`, then the figure under each heading of `columns`.

    Nothing is cut off where the terminal, or the width that is assumed for a pipe, is narrower than a row.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(line[name] for name in names), *(readable(line[key]) for key in columns.values()))
    Console(width=_WIDEST).print(table)


def readable(value: Any) -> str:
    """Format a figure: four significant digits, large numbers whole, intervals as `value (low to high)`."""
    if isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
        return "{} ({} to {})".format(*(readable(value[key]) for key in ("value", "low", "high")))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return str(value)
