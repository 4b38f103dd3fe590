"""Progress, notes and errors on stderr; stdout has only results.

On a terminal, progress is a bar that vanishes when the work is done. Elsewhere no progress is shown, except a
line every few seconds with `--verbose`. With `--quiet` only errors are printed. rich heeds NO_COLOR.
"""

import logging
import math
import os
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from io import TextIOWrapper
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

stderr = Console(stderr=True)
_EVERY = 5.0  # seconds between the progress lines of --verbose


@dataclass
class Verbosity:
    """State of --quiet and --verbose. first_rank: True on rank 0 of a job, and for a single process."""

    quiet: bool = False
    verbose: bool = False
    first_rank: bool = True


verbosity = Verbosity()


def say(message: str) -> None:
    """Print one line to stderr, never wrapped. Does nothing where stderr cannot be written."""
    with suppress(OSError):
        print(f"exflow: {message}", file=sys.stderr)


def note(message: str) -> None:
    """Print a line that a person may want to know, unless the command is quiet."""
    if not verbosity.quiet:
        say(message)


def say_error(error: BaseException) -> None:
    """Print an error as one line; with --verbose its traceback comes first."""
    if verbosity.verbose:
        traceback.print_exception(error)
    say(str(error))


class _Notes(logging.Handler):
    """Prints the library's log records as notes. All ranks log the same, so only the first prints."""

    def emit(self, record: logging.LogRecord) -> None:
        if verbosity.first_rank:
            note(record.getMessage())


def begin() -> None:
    """Prepare for a command: reset --quiet and --verbose, and print the log records of the library.

    Characters that stdout's encoding lacks become escapes, so that the rest of a result is not lost.
    A closed stream is replaced by a null device: Python sets it to None, and would print errors to stdout.
    """
    verbosity.quiet = verbosity.verbose = False
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the program runs
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("exflow").handlers = [_Notes()]


class _Pace(ProgressColumn):
    """Column of a progress bar: amount, speed and remaining time, or the elapsed time of endless work."""

    def render(self, task: Task) -> Text:
        return Text(pace(task))


def pace(task: Task) -> str:
    """Return `8,192/32,768 tokens, 2,700/s, 0:00:09 left`, or the parts of this text that are known."""
    if task.total is None:
        return str(timedelta(seconds=int(task.elapsed or 0)))
    unit = task.fields["unit"]
    parts = [f"{task.completed:,.0f}/{task.total:,.0f} {unit}"] if unit else []
    if unit and task.speed:
        parts.append(f"{task.speed:,.0f}/s" if task.speed >= 10 else f"{task.speed:.2g}/s")
    if task.time_remaining is not None and not task.finished:
        parts.append(f"{timedelta(seconds=math.ceil(task.time_remaining))} left")
    return ", ".join(parts)


class Work:
    """Progress of a piece of work: its name, the share that is done, and a detail."""

    def __init__(self, what: str, unit: str = "", shown: bool = True) -> None:
        """unit: unit of the amount; without one only the share is shown. shown: True on one rank of a job."""
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            _Pace(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=stderr,
            transient=True,
            redirect_stdout=False,
            disable=verbosity.quiet or not shown or not stderr.is_terminal or stderr.is_dumb_terminal,
        )
        self.lines = verbosity.verbose and shown
        self.last = self.began = monotonic()
        self.id = self.progress.add_task(what, total=None, unit=unit, detail="")

    @property
    def task(self) -> Task:
        return self.progress.tasks[TaskID(0)]

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.lines:
            how = "done" if error is None else "stopped"
            say(f"{self.task.description}: {how} after {monotonic() - self.began:.1f} s")

    def advance(self, done: float, total: float) -> None:
        """Show that `done` of `total` units are complete."""
        self.progress.update(self.id, completed=done, total=total)
        self._line()

    def tell(self, detail: str) -> None:
        """Show a detail of the work."""
        self.progress.update(self.id, detail=detail)
        self._line()

    def _line(self) -> None:
        if self.lines and monotonic() - self.last >= _EVERY:
            self.last = monotonic()
            parts = (self.task.description, pace(self.task), self.task.fields["detail"])
            say(", ".join(part for part in parts if part))


class TimedWork(Work):
    """Work with a time limit in seconds; its bar shows the time used."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(what)
        self.seconds = seconds

    def tell(self, detail: str) -> None:
        self.advance(min(monotonic() - self.began, self.seconds), self.seconds)
        super().tell(detail)
