"""Drawings of how a decode step scales: one curve for each strategy over sizes of cluster."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exflow.files import atomic_path
from exflow.report.axes import FOOT, HIGH, LEFT, TOP, Axis, axis_of, curve, frame, marker
from exflow.report.draw.svg import WIDTH, drawing, standing_alone, text

CURVES = (  # strategy and placement of each curve, in the order of the colours
    ("dispatch-combine", "contiguous"),
    ("dispatch-combine", "affinity"),
    ("node-coherent", "affinity"),
    ("coherent", "affinity"),
    ("replicated", "affinity"),
)
DRAWN = {  # by name of the file: the figure of a step, and its title
    "step-time": ("step_ms", "milliseconds a step"),
    "throughput": ("tokens_per_s_per_gpu", "tokens/s a GPU"),
}
_LINE = 20.0  # of the legend

Sizes = Sequence[dict[str, Any]]  # as `Simulation.as_json` has them


def write_scaling(sizes: Sizes, folder: Path) -> None:
    """Write a file for each drawing. Raises InputError if one cannot be written."""
    for name, (figure, title) in DRAWN.items():
        with atomic_path(folder / f"{name}.svg") as temporary:
            temporary.write_text(scaling_drawing(sizes, figure, title), encoding="utf-8")


def scaling_drawing(sizes: Sizes, figure: str, title: str) -> str:
    """Draw an SVG file with the sizes at which each variant fits into memory.

    If a number of GPUs can be grouped in several ways, the fastest step counts.
    """
    lines = [_points(sizes, name, figure) for name in CURVES]
    gpus = sorted({size["gpus"] for size in sizes})
    x = Axis(gpus[0], gpus[-1], LEFT + 10, WIDTH - 24, gpus, logarithmic=True)
    y = axis_of([0.0, *(value for points in lines for _, value in points)], TOP + HIGH, TOP)
    parts = [frame(x, y, "GPUs", f"{title}, predicted")]
    for colour, ((strategy, placement), points) in enumerate(zip(CURVES, lines, strict=True)):
        row = TOP + HIGH + FOOT + _LINE * colour
        parts += [marker((LEFT + 6, row - 4), colour), text(LEFT + 20, row, f"{strategy}, {placement}")]
        if points:
            places = [(x.at(at), y.at(value)) for at, value in points]
            parts += [curve(places, colour), *(marker(place, colour) for place in places)]
    height = TOP + HIGH + FOOT + _LINE * len(CURVES)
    return standing_alone(drawing(height, f"{title} by number of GPUs, a curve a strategy", parts))


def _points(sizes: Sizes, name: tuple[str, str], figure: str) -> list[tuple[int, float]]:
    best: dict[int, dict[str, Any]] = {}
    for size in sizes:
        for each in size["steps"]:
            if (each["strategy"], each["placement"]) == name and each["fits"]:
                known = best.setdefault(size["gpus"], each)
                best[size["gpus"]] = min(known, each, key=lambda step: step["step_ms"])
    return [(gpus, best[gpus][figure]) for gpus in sorted(best)]
