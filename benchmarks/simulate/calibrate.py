"""Compares the cost model with every measured run: decode steps, emulated hosts, DeepEP's table."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.simulate.deepep import published
from benchmarks.simulate.errors import choices, ratios, row, summary
from benchmarks.simulate.hosts import host_rows
from benchmarks.simulate.measured_steps import FITTED, fitted_layer_s, measured_steps


def calibrate(traces: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="exflow-simulate-") as temporary:
        steps = list(measured_steps(traces, Path(temporary)))
    layer_s, rows = fitted_layer_s(steps), [row(each) for each in steps]
    return {
        "fitted_layer_us": 1e6 * layer_s,
        "fitted_to": f"{', '.join(FITTED)} on two GPUs",
        "captured": rows,
        "summary": summary(rows),
        "ratios": ratios(rows),
        "choice": choices(rows),
        "hosts": list(host_rows(traces)),
        "published": list(published()),
    }
