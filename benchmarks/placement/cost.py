"""Time of placement as layers, experts, GPUs and tokens grow: one factor at a time, side by side.

    python -m benchmarks.placement.cost -o benchmarks/results/placement-cost.json

Each line changes one number of the base problem. Times are of one run after the code is compiled: counting
the trace, the search over pairs (its trials are as many as its settings say), the descent on messages, the
bound.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.routing.generated import generate
from exflow.placement.counts.affinity import count_affinity
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.anneal import search_all
from exflow.placement.solve.objective import Objective, make_problem
from exflow.placement.solve.refine import refine
from exflow.placement.solve.solve import certified_bound


@dataclass(frozen=True)
class Shape:
    tokens: int = 20_000
    layers: int = 24
    experts: int = 64
    top_k: int = 4
    gpus: int = 8


@dataclass(frozen=True)
class Times:
    count_s: float
    search_s: float
    refine_s: float
    bound_s: float


BASE = Shape()
SHAPES = [
    BASE,
    *(replace(BASE, layers=layers) for layers in (12, 48)),
    *(replace(BASE, experts=experts) for experts in (32, 128, 256)),
    *(replace(BASE, gpus=gpus) for gpus in (2, 32)),
    *(replace(BASE, tokens=tokens) for tokens in (10_000, 40_000)),
    *(replace(BASE, top_k=top_k) for top_k in (1, 8)),
]


def measure(shape: Shape) -> Times:
    trace = generate(
        tokens=shape.tokens,
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        skew=0.5,
        affinity=0.6,
        sequences=100,
        seed=0,
    )
    topology = Topology(gpus_per_node=shape.gpus)
    began = perf_counter()
    counts = count_affinity(trace)
    counted = perf_counter()
    problem = make_problem([counts], [1.0], topology, Objective(), np.ones_like(counts.load))
    before_search = perf_counter()
    found = search_all(problem)
    searched = perf_counter()
    refine(problem, trace, found[0])
    refined = perf_counter()
    certified_bound(problem, topology)
    bounded = perf_counter()
    return Times(counted - began, searched - before_search, refined - searched, bounded - refined)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    output: Path | None = parser.parse_args().output
    measure(replace(BASE, tokens=500, layers=2))  # compiles
    lines = []
    print(
        f"{'tokens':>7}{'layers':>7}{'experts':>8}{'top_k':>6}{'gpus':>5}{'count':>8}{'search':>8}{'refine':>8}{'bound':>7}"
    )
    for shape in SHAPES:
        times = measure(shape)
        lines.append({**asdict(shape), **{name: round(value, 3) for name, value in asdict(times).items()}})
        seconds = f"{times.count_s:>8.2f}{times.search_s:>8.1f}{times.refine_s:>8.1f}{times.bound_s:>7.1f}"
        print(
            f"{shape.tokens:>7}{shape.layers:>7}{shape.experts:>8}{shape.top_k:>6}{shape.gpus:>5}{seconds}",
            flush=True,
        )
    if output:
        about = {
            "command": " ".join(sys.argv),
            "date": date.today().isoformat(),
            "cores": os.cpu_count(),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        output.write_text(json.dumps({**about, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
