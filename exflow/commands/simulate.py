"""The simulate command: predicts the time of a decode step for a trace, a model and cluster sizes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exflow.cost.crossover import Crossover, crossovers
from exflow.cost.machines import Setting, load_setting
from exflow.cost.simulate import (
    LEVEL,
    Layout,
    Point,
    Step,
    Variant,
    fastest,
    split_sequences,
    step,
    strategies_on,
    variants,
)
from exflow.errors import InputError
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.confidence import split_by_sequence
from exflow.profiling.trace import RoutingTrace

HELD_OUT = 0.25
BATCH_PER_GPU = 64
ENOUGH = 64  # tokens a rank for a judgement; with fewer, chance makes ranks look uneven

Tell = Callable[[str], None]


@dataclass(frozen=True)
class SimulateJob:
    """Arguments of the command; see `exflow simulate --help`."""

    trace: Path
    model: Path
    plans: list[Path]
    gpus: list[int]
    gpus_per_node: int
    widest: list[int]
    batch: int | None
    batch_per_gpu: int | None
    context: int
    machine: Path | None
    time_limit: float
    phase: str = "all"

    def batch_on(self, gpus: int) -> int:
        """Sequences of the whole job."""
        return self.batch or gpus * (self.batch_per_gpu or BATCH_PER_GPU)

    def check(self) -> None:
        """Raise InputError for options that contradict each other."""
        if self.batch is not None and self.batch_per_gpu is not None:
            raise InputError("--batch and --batch-per-gpu set the same number; give one")
        if self.plans and self.widest:
            raise InputError(f"--expert-parallel {self.widest[0]}: a plan says its own size; leave it out")
        if not self.plans and not self.gpus:
            raise InputError("--gpus is missing: give the numbers of GPUs to simulate, or a plan")


@dataclass(frozen=True)
class Size:
    """Results for one cluster size: a step for every variant, and the nearest crossovers."""

    layout: Layout
    batch: int  # sequences of the whole job
    point: Point
    steps: tuple[Step, ...]
    crossovers: tuple[Crossover, ...]

    @property
    def best(self) -> Step | None:
        return fastest([each.variant for each in self.steps], self.point)

    def tokens_per_s(self, step: Step) -> float:
        return self.batch / step.seconds

    def as_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "gpus": self.layout.gpus,
            "nodes": math.ceil(self.layout.gpus / self.layout.gpus_per_node),
            "expert_parallel": self.layout.width,
            "copies": self.layout.copies,
            "batch": self.batch,
            "fastest": None if best is None else [best.variant.strategy, best.variant.placement],
            "steps": [self._row(each) for each in self.steps],
            "turns": [vars(each) for each in self.crossovers],
        }

    def _row(self, step: Step) -> dict[str, Any]:
        traffic, prediction = step.variant.traffic, step.prediction
        messages = [sum(ways) for ways in zip(traffic.dispatch, traffic.combine, strict=True)]
        return {
            "strategy": step.variant.strategy,
            "placement": step.variant.placement,
            "step_ms": 1e3 * step.seconds,
            "exchange_ms": 1e3 * prediction.exchange_s,
            "compute_ms": 1e3 * prediction.compute_s,
            "background_ms": 1e3 * prediction.background_s,
            "tokens_per_s": self.tokens_per_s(step),
            "tokens_per_s_per_gpu": self.tokens_per_s(step) / self.layout.gpus,
            "memory_gb": prediction.memory_bytes / 1e9,
            "fits": step.fits,
            "messages_intra_node": messages[0],
            "messages_inter_node": messages[1],
            "kv_copies": sum(traffic.kv),
            "busiest": traffic.expert_imbalance,
            "attending": traffic.attention_imbalance,
        }


@dataclass(frozen=True)
class Simulation:
    """Results for every cluster size, and notes about them."""

    setting: Setting
    sizes: tuple[Size, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.setting.model.name,
            "context": self.setting.context,
            "sizes": [size.as_json() for size in self.sizes],
            "notes": list(self.notes),
        }


def run_simulate(job: SimulateJob, tell: Tell) -> Simulation:
    """Read files, make placements if no plan is given, and predict. Raises InputError for bad input."""
    job.check()
    trace = RoutingTrace.load(job.trace).of_phase(job.phase)
    setting = load_setting(job.model, BATCH_PER_GPU, job.context, job.machine, trace)
    notes: list[str] = []
    choices = _of_plans(job, trace, notes) if job.plans else _placed_here(job, trace, notes, tell)
    sizes = tuple(_size(job, setting, layout, choice) for layout, choice in choices)
    if job.machine is None:
        notes.append(
            "all GPUs are taken to be H200s; the speed of links between nodes is assumed, not measured"
        )
    return Simulation(setting, sizes, tuple(notes))


def _size(job: SimulateJob, setting: Setting, layout: Layout, choice: list[Variant]) -> Size:
    batch = job.batch_on(layout.gpus)
    point = Point(
        setting.model,
        math.ceil(batch / layout.copies),
        setting.context,
        setting.machine_for(choice[0].plan),
    )
    steps = tuple(step(variant, point) for variant in choice)
    return Size(layout, batch, point, steps, tuple(crossovers(choice, point)))


def _placed_here(
    job: SimulateJob, trace: RoutingTrace, notes: list[str], tell: Tell
) -> list[tuple[Layout, list[Variant]]]:
    """Make placements for each group size on three quarters of the sequences; judge them on the rest."""
    train, test = split_by_sequence(trace, HELD_OUT)
    layouts = dict.fromkeys(
        Layout.of(gpus, job.gpus_per_node, trace.num_experts, widest)
        for gpus in job.gpus
        for widest in job.widest or [gpus]
    )
    of_group = {
        topology: variants(train, test, topology, job.time_limit, tell)
        for topology in dict.fromkeys(layout.topology for layout in layouts)
    }
    _note_few(test, max(layout.width for layout in layouts), notes)
    return [(layout, of_group[layout.topology]) for layout in layouts]


def _of_plans(job: SimulateJob, trace: RoutingTrace, notes: list[str]) -> list[tuple[Layout, list[Variant]]]:
    """Judge the plans beside the contiguous placement, on their own GPUs and on multiples of these."""
    plans = [Plan.load(path) for path in job.plans]
    topology = plans[0].topology
    for path, plan in zip(job.plans, plans, strict=True):
        _check_plan(path, plan, trace, topology, job.gpus)
    judged = split_sequences(trace, topology.num_ranks)
    found = []
    for strategy in strategies_on(topology):
        contiguous = place(
            trace,
            topology,
            objective=Objective(strategy.placed_for, owner_price=LEVEL),
            solving=Solving("contiguous"),
            redundant_experts=plans[0].num_slots - plans[0].num_experts,
        )
        found.append(Variant.of(strategy, "contiguous", contiguous, judged))
        for path, plan in zip(job.plans, plans, strict=True):
            found.append(Variant.of(strategy, path.name, plan, judged))
    _note_few(trace, topology.num_ranks, notes)
    return [
        (Layout(gpus, topology.gpus_per_node, topology.num_ranks), found)
        for gpus in job.gpus or [topology.num_ranks]
    ]


def _check_plan(path: Path, plan: Plan, trace: RoutingTrace, topology: Topology, sizes: list[int]) -> None:
    try:
        plan.check_trace(trace)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    ours, theirs = ((each.num_nodes, each.gpus_per_node) for each in (plan.topology, topology))
    if ours != theirs:
        raise InputError(f"{path}: the plan is for {plan.topology}, another for {topology}; give one's GPUs")
    for gpus in sizes:
        if gpus % plan.num_ranks:
            raise InputError(
                f"--gpus {gpus}: is no multiple of the {plan.num_ranks} ranks of {path}; give a multiple"
            )


def _note_few(trace: RoutingTrace, ranks: int, notes: list[str]) -> None:
    if trace.num_tokens < ENOUGH * ranks:
        notes.append(
            f"{trace.num_tokens:,} tokens are few for {ranks} ranks, whose load looks less even by chance"
        )
