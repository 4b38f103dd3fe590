"""The place command: from folders of traces to a plan, and what can be said of how good it is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exflow.errors import InputError
from exflow.placement.learning_curve import learning_curve, verdict
from exflow.placement.make_plan import InUse, Solving, place
from exflow.placement.pareto import trade_off
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology, topology_of
from exflow.placement.plan.topology_file import load_topology
from exflow.placement.robust import messages, place_for_the_worst
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.confidence import held_out_figures, split_by_sequence
from exflow.profiling.merge import merge
from exflow.profiling.trace import RoutingTrace

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Where:
    """GPUs and their memory for experts.

    gpu_memory   GiB of each GPU
    expert_size  MiB of one expert in one layer
    """

    gpus: int | None = None
    nodes: int = 1
    topology_file: Path | None = None
    redundant_experts: int = 0
    gpu_memory: float | None = None
    expert_size: float | None = None

    def topology(self) -> Topology:
        """Raises InputError unless GPUs are given in just one of the two ways."""
        if (self.gpus is None) == (self.topology_file is None):
            raise InputError("give the GPUs either by --gpus (and --nodes) or by --topology")
        if self.topology_file is not None:
            return load_topology(self.topology_file)
        return topology_of(self.gpus or 1, self.nodes)

    def check_memory(self, trace: RoutingTrace, num_ranks: int) -> None:
        """Raises InputError if the experts of a rank are larger than the memory for them."""
        if self.gpu_memory is None or self.expert_size is None:
            return
        slots = math.ceil((trace.num_experts + self.redundant_experts) / num_ranks)
        needed = slots * trace.num_layers * self.expert_size / 1024
        if not needed <= self.gpu_memory:
            raise InputError(
                f"--gpu-memory {self.gpu_memory:g}: {slots} experts in {trace.num_layers} layers take "
                f"{needed:.1f} GiB a GPU; use more GPUs or fewer redundant experts"
            )


@dataclass(frozen=True)
class PlaceJob:
    """Arguments of the command; see `exflow place --help`."""

    traces: list[Path]
    where: Where
    objective: Objective
    solving: Solving
    weights: list[float] | None = None
    worst_case: bool = False
    start: Path | None = None
    max_moves: int | None = None
    holdout: float | None = None
    pareto: bool = False
    learning_curve: bool = False


@dataclass(frozen=True)
class Placement:
    """A plan, with the tables that were asked for, ready for JSON."""

    plan: Plan
    pareto: list[dict[str, Any]] | None = None
    learning_curve: list[dict[str, Any]] | None = None
    verdict: str | None = None
    by_trace: dict[str, float] | None = None  # messages per token and layer on each of several traces


def run_place(job: PlaceJob, tell: Tell) -> Placement:
    """Make the plan. Raises InputError where the settings contradict each other or the traces."""
    _check(job)
    topology = job.where.topology()
    traces = [RoutingTrace.load(path) for path in job.traces]
    job.where.check_memory(traces[0], topology.num_ranks)
    held_out = []
    if job.holdout is not None:
        halves = [split_by_sequence(trace, job.holdout) for trace in traces]
        traces, held_out = [train for train, _ in halves], [test for _, test in halves]

    tables: dict[str, Any] = {}
    if job.pareto:
        points = trade_off(
            traces,
            topology,
            objective=job.objective,
            solving=job.solving,
            redundant_experts=job.where.redundant_experts,
            tell=lambda price: tell(f"balance price {price:g}"),
        )
        plan = next(each.plan for each in points if each.balance_price == job.objective.balance_price)
        tables["pareto"] = [each.figures() for each in points]
    else:
        plan = _place(job, traces, topology, tell)
    if job.learning_curve:
        curve = learning_curve(
            merge(traces),
            topology,
            objective=job.objective,
            solving=job.solving,
            redundant_experts=job.where.redundant_experts,
            tell=lambda tokens: tell(f"from {tokens:,} tokens"),
        )
        tables |= {"learning_curve": [vars(point) for point in curve], "verdict": verdict(curve)}
    if held_out:
        figures = held_out_figures(plan, merge(held_out), merge(traces))
        plan = replace(plan, expected=plan.expected | {"held_out": figures})
    if len(traces) > 1:
        judged = held_out or traces
        names = [str(path) for path in job.traces]
        tables["by_trace"] = dict(zip(names, [messages(plan, each) for each in judged], strict=True))
    return Placement(plan, **tables)


def _place(job: PlaceJob, traces: Sequence[RoutingTrace], topology: Topology, tell: Tell) -> Plan:
    def progress(objective: float, bound: float, seconds: float) -> None:
        tell(f"objective {objective:.4f}, bound {bound:.4f}")

    if job.worst_case:
        return place_for_the_worst(
            traces,
            topology,
            objective=job.objective,
            solving=job.solving,
            redundant_experts=job.where.redundant_experts,
            tell=lambda done, worst: tell(f"round {done}, {worst:.4f} messages at worst"),
        )
    in_use = None
    if job.start is not None and job.max_moves is not None:
        in_use = InUse(Plan.load(job.start), job.max_moves)
    return place(
        traces,
        topology,
        objective=job.objective,
        solving=replace(job.solving, progress=progress),
        weights=job.weights,
        redundant_experts=job.where.redundant_experts,
        in_use=in_use,
    )


def _check(job: PlaceJob) -> None:
    if (job.where.gpu_memory is None) != (job.where.expert_size is None):
        raise InputError("--gpu-memory and --expert-size need each other; give both")
    if job.start is not None and (job.where.redundant_experts or job.learning_curve):
        raise InputError(
            "--from keeps the replicas of the plan in use; leave out --redundant-experts and --learning-curve"
        )
    if (job.start is None) != (job.max_moves is None):
        raise InputError("--from and --max-moves need each other; give both")
    if job.weights is not None:
        if len(job.weights) != len(job.traces):
            raise InputError(
                f"--weight: {len(job.weights)} given for {len(job.traces)} traces; give one for each"
            )
        if not all(0 < weight < float("inf") for weight in job.weights):
            raise InputError(
                f"--weight: {job.weights} holds a weight that is no positive number; give positive numbers"
            )
    extras = {"--worst-case": job.worst_case, "--pareto": job.pareto, "--from": job.start is not None}
    asked = [name for name, given in extras.items() if given]
    if len(asked) > 1 or (asked and job.weights is not None):
        raise InputError(
            f"{asked[0]} does not go with {asked[1] if len(asked) > 1 else '--weight'}; give one"
        )
    if job.worst_case and len(job.traces) < 2:
        raise InputError("--worst-case compares traces; give two at least")
