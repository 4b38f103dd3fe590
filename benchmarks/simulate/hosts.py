"""Runs on emulated hosts (results/hosts.json), beside predictions from the job's own measurements."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.hosts.judge import moved_of
from benchmarks.hosts.plans import plans_of
from benchmarks.hosts.shapes import replayed, split
from benchmarks.simulate.common import MACHINES, RESULTS, tell
from exflow.cost.predict import predict
from exflow.cost.workload import Workload
from exflow.files import read_json
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.machine import Machine
from exflow.placement.time.machines import load_machine


def host_rows(traces: Path) -> Iterator[dict[str, Any]]:
    """The runs on emulated hosts, predicted from the figures that each job measured of itself before."""
    document = read_json(RESULTS / "hosts.json", "result", "run benchmarks/hosts/run.py")
    for result in document["results"]:
        parts = split(result["shape"], traces, result["steps"] + 1)
        trace = replayed(parts, result["batch"])
        decoded = trace.select(trace.position > 0)
        machine = _machine_of_hosts(result["machine"])
        tell(f"hosts: placing {result['shape']}")
        for placement, plan in plans_of(parts.train, result["hosts"]).items():
            load = Workload.of(parts.config, plan, result["batch"], result["steps"] // 2, 4)
            for variant in result["variants"]:
                if variant["placement"] == placement:
                    moved = moved_of(variant["strategy"], plan, decoded)
                    predicted = 1e3 * predict(Strategy.COHERENT, load, moved, machine).step_s
                    yield {
                        "shape": result["shape"],
                        "group": variant["strategy"],
                        "placement": placement,
                        "measured_ms": variant["step_ms"],
                        "predicted_ms": predicted,
                        "error": predicted / variant["step_ms"] - 1,
                    }


def _machine_of_hosts(figures: dict[str, float]) -> Machine:
    """A machine as `measure_here` of benchmarks/hosts/rank.py wrote it."""
    machine = load_machine(MACHINES / "hosts-1gbit.yaml")
    link = replace(
        machine.between,
        latency_s=figures["exchange_latency_ms"] / 1e3,
        bytes_per_s=1e6 * figures["megabytes_per_s_of_a_rank"],
    )
    return replace(
        machine,
        inside=link,
        between=link,
        layer_s=figures["layer_ms"] / 1e3,
        token_s=figures["token_us"] / 1e6,
        shared=bool(figures["shared"]),
        memory_bytes=math.inf,
    )
