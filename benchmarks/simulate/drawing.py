"""Draws the curves of docs/simulate.md."""

from pathlib import Path
from typing import Any

from exflow.files import atomic_path
from exflow.report.scaling import DRAWN, scaling_drawing

DRAWING = ("gpt-oss", "h200", "64")  # scenario, machine, sequences a GPU
MOST = 1024  # GPUs that curves go to


def draw(document: dict[str, Any], path: Path) -> None:
    """The curves of docs/simulate.md: of every number of GPUs in groups of every size that was simulated."""
    scenario, machine, batch = DRAWING
    groups = [batches[batch] for batches in document[scenario]["machines"][machine].values()]
    sizes = [
        group | {"gpus": gpus}
        for group in groups
        for gpus in (group["gpus"] << more for more in range(MOST.bit_length()))
        if gpus <= MOST
    ]
    with atomic_path(path) as temporary:
        temporary.write_text(scaling_drawing(sizes, *DRAWN["throughput"]), encoding="utf-8")
