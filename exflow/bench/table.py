"""Table of `exflow bench decode`: measured times beside the predictions of the cost model."""

import os
import platform
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby, product
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from exflow.bench.job import WARM_UP, ResolvedBench
from exflow.comm.transport_names import NAMES as TRANSPORTS
from exflow.comm.transport_names import Transport
from exflow.cost.auto import expected_figures, predictions
from exflow.cost.predict import Prediction, choose
from exflow.cost.workload import Workload
from exflow.errors import InputError
from exflow.files import write_json
from exflow.job.cluster import Cluster
from exflow.model.random_weights import RandomWeights
from exflow.placement.time.machine import Machine


@dataclass(frozen=True)
class Case:
    """One row of the table. placement: the plan's name in it."""

    batch: int
    strategy: str
    transport: Transport
    placement: str

    def __str__(self) -> str:
        return f"{self.strategy}, {self.transport}, {self.placement}, batch {self.batch}"


@dataclass(frozen=True)
class Outcome:
    """Measurements of a step: milliseconds of the slowest rank; bytes that a rank sends, mean over ranks.

    critical: hidden states, or the bytes of an all-reduce. background: keys and values. wire: all bytes sent,
    with padding and headers. floor_ms: only for captured steps on GPUs of one node.
    """

    tpot_ms: float
    p99_ms: float
    critical_bytes_per_step: float
    background_bytes_per_step: float
    wire_bytes_per_step: float
    floor_ms: float | None = None


Result = Outcome | str  # or the reason why there is no outcome
Predicted = dict[Case, Prediction]


def cases_of(setting: ResolvedBench) -> list[Case]:
    """Cases of the benchmark, in the order of the table."""
    parts = (setting.batches, setting.strategies, setting.transports, setting.plans)
    return [Case(*each) for each in product(*parts)]


def predicted(setting: ResolvedBench, machines: dict[Transport, Machine]) -> Predicted:
    """Predictions of the cost model for every strategy, asked for or not; empty for one process."""
    found: Predicted = {}
    here = setting.topology
    if here is None:
        return found
    for name, plan in setting.plans.items():
        if plan.topology.num_nodes != here.num_nodes:  # as auto.choose_strategy judges it
            plan = replace(plan, topology=here, expected={})
        figures = {"strategies": expected_figures(plan, setting.config.top_k)}
        plan = replace(plan, expected=plan.expected | figures)
        for batch, (transport, machine) in product(setting.batches, machines.items()):
            load = Workload.of(setting.config, plan, batch, setting.context, setting.dtype.itemsize)
            for each in predictions(load, plan, machine):
                found[Case(batch, each.strategy, transport, name)] = each
    return found


def taken_by_auto(found: Predicted, machines: dict[Transport, Machine]) -> list[Case]:
    """The case that `auto` would run for each batch: the first transport that works, and the placement with
    the shortest predicted step. Batches that fit under no strategy are left out."""
    taken: dict[int, Case] = {}
    transport = next((name for name in TRANSPORTS if name in machines), None)
    if transport is None:
        return []
    of_plan = [(case, each) for case, each in found.items() if case.transport == transport]
    for _, group in groupby(of_plan, lambda item: (item[0].batch, item[0].placement)):
        together = list(group)
        try:
            name, _ = choose([each for _, each in together], machines[transport].memory_bytes)
        except InputError:
            continue
        case = next(case for case, _ in together if case.strategy == name)
        best = taken.setdefault(case.batch, case)
        if found[case].step_s < found[best].step_s:
            taken[case.batch] = case
    return list(taken.values())


@dataclass
class Report:
    """Rank 0's table as it grows. about: figures of the whole job. cases: all cases, in order."""

    about: dict[str, Any]
    cases: list[Case]
    output: Path | None
    predicted: Predicted = field(default_factory=dict)
    taken_by_auto: list[Case] = field(default_factory=list)
    results: dict[Case, Result] = field(default_factory=dict)

    def add(self, case: Case, result: Result) -> None:
        """Add a result, and write all results so far."""
        self.results[case] = result
        if self.output is not None:
            write_json(self.output, self.document())

    def document(self) -> dict[str, Any]:
        """Output of `exflow bench decode --json`. speedup: over the first row of the same batch."""
        rows = [self._row(case) for case in self.cases if case in self.results]
        for row in rows:
            first = next(each for each in rows if each["batch"] == row["batch"])["tpot_ms"]
            row["speedup"] = first / row["tpot_ms"] if first and row["tpot_ms"] else None
        auto = [{**asdict(case), **self._of_model_and_clock(case)} for case in self.taken_by_auto]
        return {**self.about, "rows": rows, "auto": auto}

    def _row(self, case: Case) -> dict[str, Any]:
        result = self.results[case]
        known = asdict(result) if isinstance(result, Outcome) else dict.fromkeys(Outcome.__annotations__)
        tpot_ms, floor_ms = known["tpot_ms"], known["floor_ms"]
        return {
            **asdict(case),
            **known,
            **self._of_model_and_clock(case),
            "tokens_per_s": 1000 * case.batch / tpot_ms if tpot_ms else None,
            "times_floor": tpot_ms / floor_ms if tpot_ms and floor_ms else None,
            "stopped": result if isinstance(result, str) else None,
        }

    def _of_model_and_clock(self, case: Case) -> dict[str, Any]:
        """Predicted and measured milliseconds; None if there is no figure."""
        found, result = self.predicted.get(case), self.results.get(case)
        return {
            "predicted_ms": 1000 * found.step_s if found else None,
            "tpot_ms": result.tpot_ms if isinstance(result, Outcome) else None,
        }


def about(setting: ResolvedBench, cluster: Cluster, machines: dict[Transport, Machine]) -> dict[str, Any]:
    """Figures shared by all cases: model, hardware, versions, date, command, links."""
    on_gpus = cluster.device.type == "cuda"
    part = torch.cuda.get_device_name() if on_gpus else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "model": setting.config.name,
        "weights": "random" if isinstance(setting.weights, RandomWeights) else str(setting.weights.folder),
        "routing": "gates" if setting.replay is None else str(setting.replay),
        "ranks": cluster.num_ranks,
        "nodes": cluster.num_nodes,
        "hardware": part,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "context": setting.context,
        "steps": setting.steps,
        "warm_up": WARM_UP,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": setting.command,
        "links": {transport: link_figures(machine, cluster) for transport, machine in machines.items()},
    }


def link_figures(machine: Machine, cluster: Cluster) -> dict[str, float | None]:
    """Figures of the link on which exchanges wait, inside a node or between nodes, and of memory."""
    link = machine.inside if cluster.num_nodes == 1 else machine.between
    return {
        "latency_us": 1e6 * link.latency_s,
        "link_gb_s": link.bytes_per_s / 1e9 if isfinite(link.bytes_per_s) else None,
        "read_gb_s": machine.read_bytes_per_s / 1e9,
    }
