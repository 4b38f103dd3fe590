"""What a person sees while work goes on: progress and errors, on stderr; stdout holds results alone."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

if TYPE_CHECKING:
    from exflow.train import Progress as TrainingProgress

stderr = Console(stderr=True)


def say(message: str) -> None:
    """One line on stderr, never wrapped."""
    print(f"exflow: {message}", file=sys.stderr)


def status(text: str) -> Status:
    return stderr.status(text)


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )


class TrainingLog:
    """A bar with the latest figures; checkpoints stay on the screen as lines of their own."""

    def __init__(self, steps: int) -> None:
        self.bar = progress_bar()
        self.task = self.bar.add_task("training", total=steps)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def report(self, progress: "TrainingProgress") -> None:
        self.bar.update(self.task, completed=progress.step)
        if (bits := progress.held_out_bits_per_byte) is not None:
            self._print(progress.step, f"held-out {bits:.3f} bits per byte")
        if (latest := progress.figures) is not None:
            speed = f"{latest.tokens_per_s:,.0f} tokens/s"
            figures = f"loss {latest.loss:.3f}  busiest expert {latest.balance:.2f}x  {speed}"
            self.bar.update(self.task, description=figures)
            if not stderr.is_terminal:
                self._print(progress.step, figures)

    def _print(self, step: int, text: str) -> None:
        self.bar.console.print(f"step {step}  {text}", soft_wrap=True, highlight=False)
