"""Results of the benchmark by time, row by row, and their table: on a terminal, and as Markdown from a file.

python -m benchmarks.placement.time_table FILE.json
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from exflow.files import read_json
from exflow.placement.traffic.step_time import StepTime

NAMES = ("case", "machine", "method")
FIGURES = (
    "redundant",
    "s",
    "step us",
    "ratio",
    "exchange us",
    "experts us",
    "link rows",
    "imbalance",
    "messages",
    "touched",
)


@dataclass(frozen=True)
class TimeRow:
    """A method's plan for a case, judged on held-out tokens, or the reason why there is none.

    redundant  slots of each layer beyond one for each expert, as the plan has them
    seconds    of making the plan
    ratio      step time over that of experts in order without replicas
    """

    case: str
    machine: str
    method: str
    redundant: int
    seconds: float = 0.0
    time: StepTime | None = None
    ratio: float | None = None
    skipped: str = ""

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Self:
        """Read a row as `asdict` wrote it."""
        time = stored["time"]
        return cls(**stored | {"time": StepTime(**time) if time else None})


def table(rows: list[TimeRow]) -> Table:
    shown = Table(*NAMES, title="a decode step's MoE layers, dispatch and combine, on held-out tokens")
    for title in FIGURES:
        shown.add_column(title, justify="right")
    for number, row in enumerate(rows, start=1):
        last = number == len(rows) or rows[number].case != row.case
        shown.add_row(*cells(row), end_section=last)
    return shown


def markdown(rows: list[TimeRow]) -> str:
    """The table for a page of the documentation."""
    lines = [NAMES + FIGURES, ("---",) * len(NAMES) + ("---:",) * len(FIGURES), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: TimeRow) -> tuple[str, ...]:
    names, time = (row.case, row.machine, row.method, str(row.redundant)), row.time
    if time is None:
        return (*names, f"skipped: {row.skipped}", *[""] * (len(FIGURES) - 2))
    return (
        *names,
        f"{row.seconds:.1f}",
        f"{time.step_us:.0f}",
        "" if row.ratio is None else f"{row.ratio:.3f}",
        f"{time.exchange_us:.0f}",
        f"{time.experts_us:.0f}",
        f"{time.busiest_link_rows:.2f}",
        f"{time.compute_imbalance:.3f}",
        f"{time.messages:.3f}",
        f"{time.experts_touched:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print the results of benchmarks.placement.by_time as Markdown."
    )
    parser.add_argument("file", type=Path, metavar="FILE.json")
    document = read_json(
        parser.parse_args().file, "result", "run benchmarks/placement/by_time.py -o FILE.json"
    )
    print(markdown([TimeRow.of(row) for row in document["rows"]]))


if __name__ == "__main__":
    main()
