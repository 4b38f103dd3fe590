"""What a person sees while work goes on: progress, notes and errors, on stderr; stdout holds results alone.

On a terminal, work in progress is a bar that vanishes when it is done. Elsewhere it leaves no trace, unless
`--verbose` asks for a line about it now and then. `--quiet` leaves errors alone. rich heeds NO_COLOR.
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
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    pass

stderr = Console(stderr=True)
_EVERY = 5.0  # seconds between the lines that --verbose asks for


@dataclass
class Manners:
    """What --quiet and --verbose say, and whether this process is the first rank of its job, or alone."""

    quiet: bool = False
    verbose: bool = False
    first_rank: bool = True


manners = Manners()


def say(message: str) -> None:
    """One line on stderr, never wrapped; where that cannot be written there is nobody to tell."""
    with suppress(OSError):
        print(f"exflow: {message}", file=sys.stderr)


def note(message: str) -> None:
    """What a person may want to know, and a quiet command keeps to itself."""
    if not manners.quiet:
        say(message)


def say_error(error: BaseException) -> None:
    """One line; where that is asked for, also where the error came from."""
    if manners.verbose:
        traceback.print_exception(error)
    say(str(error))


class _Notes(logging.Handler):
    """What the library logs are notes of the command. Ranks log alike: the first speaks for all."""

    def emit(self, record: logging.LogRecord) -> None:
        if manners.first_rank:
            note(record.getMessage())


def begin() -> None:
    """At the start of a command: forget what an earlier one was told, and listen to the library.

    Characters that stdout's encoding lacks become escapes: the rest of a result is not lost with them.
    What is for a closed stream goes nowhere: Python has None for it, and prints to stdout what is for stderr.
    """
    manners.quiet = manners.verbose = False
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the program runs
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("exflow").handlers = [_Notes()]


class _Pace(ProgressColumn):
    """How much is done, how fast it goes, and how long it will take; of what has no known end, how long it
    took."""

    def render(self, task: Task) -> Text:
        return Text(pace(task))


def pace(task: Task) -> str:
    """`8,192/32,768 tokens, 2,700/s, 0:00:09 left`, as far as it is known."""
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
    """A piece of work: what it is, how much of it is done, and what is going on in it."""

    def __init__(self, what: str, unit: str = "", shown: bool = True) -> None:
        """unit: what is counted; without one it is just a share. shown: on one rank of a job."""
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            _Pace(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=stderr,
            transient=True,
            redirect_stdout=False,
            disable=manners.quiet or not shown or not stderr.is_terminal or stderr.is_dumb_terminal,
        )
        self.lines = manners.verbose and shown
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
        """So much of it is done."""
        self.progress.update(self.id, completed=done, total=total)
        self._line()

    def tell(self, detail: str) -> None:
        """This is going on."""
        self.progress.update(self.id, detail=detail)
        self._line()

    def _line(self) -> None:
        if self.lines and monotonic() - self.last >= _EVERY:
            self.last = monotonic()
            parts = (self.task.description, pace(self.task), self.task.fields["detail"])
            say(", ".join(part for part in parts if part))


class TimedWork(Work):
    """Work that ends when its time is up, if not before."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(what)
        self.seconds = seconds

    def tell(self, detail: str) -> None:
        self.advance(min(monotonic() - self.began, self.seconds), self.seconds)
        super().tell(detail)
