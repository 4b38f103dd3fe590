"""Inputs: a reader with valid files, and the damaged file that a seed and a number stand for."""

import random
import re
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.robustness.fuzz.mutations import mutated


@dataclass(frozen=True)
class Target:
    """A reader: `files` are valid, by name; those in `attacked` are damaged; `read` is given their folder."""

    name: str
    files: dict[str, bytes]
    attacked: tuple[str, ...]
    read: Callable[[Path], object]

    def write(self, folder: Path) -> None:
        """Write the valid files to `folder`."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


@dataclass
class Result:
    """The crashes found: for each kind, the numbers of its inputs, the first one first; and inputs tried."""

    tried: int = 0
    crashes: dict[str, list[int]] = field(default_factory=dict)

    def add(self, tried: int, found: list[tuple[int, str]]) -> None:
        """Add a batch's result. The numbers of a crash stay in order, however late some are added."""
        self.tried += tried
        for number, crash in found:
            insort(self.crashes.setdefault(crash, []), number)


def case(target: Target, seed: int, number: int) -> tuple[str, bytes]:
    """The file that this input is about, and its content."""
    rng = random.Random(f"{seed} {target.name} {number}")
    name = rng.choice(target.attacked)
    return name, mutated(rng, target.files[name])


def keep(target: Target, seed: int, result: Result, folder: Path) -> None:
    """Write the first input of each kind of crash to `folder`."""
    for crash, numbers in result.crashes.items():
        name, content = case(target, seed, numbers[0])
        (folder / target.name).mkdir(parents=True, exist_ok=True)
        label = re.sub(r"[^A-Za-z0-9.]+", "-", crash)
        (folder / target.name / f"{numbers[0]}-{label}-{name}").write_bytes(content)
