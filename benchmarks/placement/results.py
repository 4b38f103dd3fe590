"""Settings and files that the placement benchmarks share."""

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.routing.machine import cpu_model
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


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
