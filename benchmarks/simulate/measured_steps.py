"""Captured steps of the decode benchmark, each beside the step that the cost model predicts."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.decode.cases import SOURCES, write_case
from benchmarks.simulate.common import RESULTS, tell
from exflow.cost.simulate import Point, Step, Variant, step
from exflow.files import read_json
from exflow.model.config_file import load_model_config
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.machine import Link, Machine
from exflow.profiling.trace import RoutingTrace

FITTED = ("top1-8", "top1-64")  # the models, on two GPUs, whose steps layer_s was fitted to
RUNS = ("decode-2xh200", "decode-4xh200", "decode-2xh100", "decode-4xh100")
OLD_GATHER = ("decode-2xh200", "decode-4xh200")  # whose collective K/V gather was replaced since
UNREACHED = {"latency_s": 0.0, "bytes_per_s": math.inf}
LAYER_S = 35e-6  # as configs/machines has it, from what these runs are fitted to
FLOPS_PER_S = 600e12  # of H200s, whose runs did not store theirs


@dataclass(frozen=True)
class Measured:
    """A step that was timed, and the variant that it ran."""

    run: str
    case: str
    transport: str
    seconds: float
    variant: Variant
    point: Point

    @property
    def use(self) -> str:
        """fitted: layer_s was fitted to this step. old gather: its K/V gather was replaced since. predicted:
        any other."""
        if self.transport == "collective" and self.variant.strategy == "coherent" and self.run in OLD_GATHER:
            return "old gather"
        return "fitted" if self.run == RUNS[0] and self.case in FITTED else "predicted"

    def on(self, machine: Machine) -> Step:
        return step(self.variant, replace(self.point, machine=machine))


def measured_steps(traces: Path, folder: Path) -> Iterator[Measured]:
    """The captured steps of the decode benchmark."""
    for run in RUNS:
        document = read_json(RESULTS / f"{run}.json", "result", "run benchmarks/decode/run.py")
        ranks = int(run.split("-")[1][0])
        found: dict[tuple[str, str, str], Variant] = {}
        for case in document["cases"]:
            at = folder / run / case["case"]
            if not at.exists():
                tell(f"{run}: placing {case['case']}")
                write_case(case["case"], SOURCES[case["case"]], traces, at, ranks)
            config, trace = load_model_config(at), RoutingTrace.load(at / "trace")
            middle = document["context"] + (document["steps"] + 3) // 2  # of the timed steps, after 3
            for row in case["rows"]:
                if row["transport"] == "eager":
                    continue
                name = (case["case"], row["strategy"], row["placement"])
                if name not in found:
                    plan = Plan.load(at / f"{row['placement']}.json")
                    found[name] = Variant.of(Strategy(row["strategy"]), row["placement"], plan, trace)
                machine = measured_machine(document, row["transport"])
                point = Point(config, case["batch"], middle, machine)
                yield Measured(
                    run, case["case"], row["transport"], row["median_us"] / 1e6, found[name], point
                )


def measured_machine(document: dict[str, Any], transport: str) -> Machine:
    """Links, memory and arithmetic as measured in the same job, with LAYER_S for the rest of a layer."""
    (stored,) = (dict(each) for each in document["machines"] if each["transport"] == transport)
    inside, between = (Link(**(stored.pop(link) or UNREACHED)) for link in ("inside", "between"))
    changes = {"layer_s": LAYER_S, "hides": float(transport != "collective")}
    return Machine(inside, between, **({"flops_per_s": FLOPS_PER_S} | stored | changes))


def fitted_layer_s(steps: list[Measured]) -> float:
    """Median over the fitted steps of the time that remains for a layer, launches left out."""
    left = [
        (each.seconds - each.on(replace(each.point.machine, layer_s=0.0)).seconds)
        / each.point.model.num_hidden_layers
        for each in steps
        if each.use == "fitted"
    ]
    return statistics.median(left)
