"""Settings and files that the placement benchmarks share."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.placement.cases import Family, progress
from benchmarks.placement.methods import SkippedError
from benchmarks.routing.machine import cpu_model
from benchmarks.routing.recorded import NoTrace
from exflow.files import atomic_path

PACKAGES = ("exflow", "numpy", "numba", "scipy", "highspy", "pymetis")


def setting(module: str) -> dict[str, Any]:
    """The facts that the figures of a benchmark depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # of all programs: are the seconds ours alone?
        "python": platform.python_version(),
        "versions": {name: _version_of(name) for name in PACKAGES},
    }


def store(output: Path | None, document: dict[str, Any]) -> None:
    """Write the document atomically, if there is an output file."""
    if output is not None:
        with atomic_path(output) as path:
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def is_wanted(only: list[str] | None, name: str) -> bool:
    """Whether the name has one of the parts `only` in it; without parts, always."""
    return not only or any(part in name for part in only)


def existing(traces: Path | None, what: str) -> Path | None:
    """The folder of traces, or None with a note that `what` is left out, where it is no folder."""
    if traces is not None and not traces.is_dir():
        progress.print(f"--traces {traces}: is no folder; its {what} are left out")
        return None
    return traces


def run_families(
    families: Iterable[Family],
    run: Callable[[Family], None],
    skipped: dict[str, str],
    write: Callable[[], None],
) -> None:
    """Run each family; the reasons of those that cannot be run go to `skipped`, which `write` stores."""
    for family in families:
        try:
            run(family)
        except (SkippedError, NoTrace) as reason:
            progress.print(f"{family.name}: skipped: {reason}")
            skipped[family.name] = str(reason)
            write()


def show(shown: Table | None, skipped: dict[str, str], lines: Iterable[str] = ()) -> None:
    """Print the table, further lines, and what was skipped."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    if shown is not None:
        console.print(shown)
    for line in lines:
        console.print(line)
    for name, reason in skipped.items():
        console.print(f"{name}: skipped: {reason}")


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
