"""Paths and settings that the parts of the simulate benchmark share."""

import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
MACHINES = Path(__file__).parents[2] / "configs" / "machines"
PLACE_SECONDS = 6.0


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
