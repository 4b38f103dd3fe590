"""Progress of `exflow train`: figures beside the bar, and a line for each checkpoint."""

import math
from typing import TYPE_CHECKING

from exflow.console import Work, note

if TYPE_CHECKING:
    from exflow.train.loop import Progress as TrainingProgress


class TrainingLog(Work):
    """A progress bar with the latest figures; each checkpoint prints a line of its own."""

    def __init__(self, steps: int) -> None:
        super().__init__("training", "steps")
        self.steps = steps
        self.held_out_bits_per_byte = math.nan  # the latest

    def report(self, progress: "TrainingProgress") -> None:
        if (latest := progress.figures) is not None:
            speed = f"{latest.tokens_per_s:,.0f} tokens/s"
            self.tell(f"loss {latest.loss:.3f}, busiest expert {latest.balance:.2f}x, {speed}")
        self.advance(progress.step, self.steps)
        if (bits := progress.held_out_bits_per_byte) is not None:
            self.held_out_bits_per_byte = bits
            note(f"step {progress.step}: held-out text takes {bits:.3f} bits per byte")
