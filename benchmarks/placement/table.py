"""Results of the placement benchmark, row by row, and their table."""

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Messages:
    """Messages per token and layer. Messages between nodes are included."""

    train: float
    test: float
    train_between_nodes: float | None  # None: one node
    test_between_nodes: float | None


@dataclass(frozen=True)
class Row:
    """A method's plan for a problem, or why there is none."""

    problem: str
    method: str
    seconds: float | None = None
    coherent: Messages | None = None
    dispatch_combine: Messages | None = None
    test_imbalance: float | None = None  # mean over layers
    gap: float | None = None  # (objective - lower bound) / objective, where both are known
    optimal: bool | None = None
    solved_by: str = ""
    skipped: str = ""


def table(rows: list[Row]) -> Table:
    titles = ("s", "train", "test", "ratio", "train", "test", "ratio", "imbalance", "gap", "solved by")
    shown = Table(
        "problem",
        "method",
        title="messages per token and layer: coherent, then dispatch and combine (between nodes in brackets)",
    )
    for title in titles:
        shown.add_column(title, justify="left" if title == "solved by" else "right")
    base = {row.problem: row for row in rows if row.method == "contiguous"}
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        last = after is None or after.problem != row.problem
        shown.add_row(row.problem, row.method, *cells(row, base.get(row.problem)), end_section=last)
    return shown


def cells(row: Row, base: Row | None) -> list[str]:
    """Cells of a method. Its messages are compared with those of the row `base` under the same strategy."""
    if row.coherent is None or row.dispatch_combine is None:
        return [""] * 9 + [f"skipped: {row.skipped}"]
    gap = "" if row.gap is None else f"{row.gap:.2%}"
    return [
        f"{row.seconds:.2f}",
        *message_cells(row.coherent, base.coherent if base else None),
        *message_cells(row.dispatch_combine, base.dispatch_combine if base else None),
        f"{row.test_imbalance:.3f}",
        "optimal" if row.optimal else gap,
        row.solved_by,
    ]


def message_cells(found: Messages, base: Messages | None) -> list[str]:
    ratio = f"{found.test / base.test:.3f}" if base and base.test else ""
    between = "" if found.test_between_nodes is None else f" ({found.test_between_nodes:.3f})"
    return [f"{found.train:.3f}", f"{found.test:.3f}{between}", ratio]
