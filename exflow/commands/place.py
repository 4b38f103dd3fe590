"""The place command: makes a plan from folders of traces, and judges how good it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exflow.commands.place_notes import notes_on
from exflow.errors import InputError
from exflow.placement.fastest_plan import compared, place_for_time, references
from exflow.placement.learning_curve import learning_curve, verdict
from exflow.placement.make_plan import InUse, Solving, place
from exflow.placement.pareto import trade_off
from exflow.placement.plan.cost_matrix import load_cost_matrix
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.replicas import equal_slots
from exflow.placement.plan.topology import Topology, topology_of
from exflow.placement.plan.topology_file import load_topology
from exflow.placement.robust import messages, place_for_the_worst
from exflow.placement.solve.objective import Objective
from exflow.placement.time.machines import DEFAULT, machine_named
from exflow.placement.time.serving import BATCH, PREFILL_BATCH, Serving, suited, target_named
from exflow.placement.time.sizes import sizes_for_trace, sizes_of
from exflow.placement.traffic.confidence import held_out_figures, split_by_sequence
from exflow.profiling.merge import merge
from exflow.profiling.trace import RoutingTrace

Tell = Callable[[str], None]
OBJECTIVES = ("time", "messages")


@dataclass(frozen=True)
class Where:
    """GPUs and their memory for experts.

    gpu_memory   GiB for experts on each GPU
    expert_size  MiB of one expert in one layer
    """

    gpus: int | None = None
    nodes: int = 1
    topology_file: Path | None = None
    redundant_experts: int = 0
    gpu_memory: float | None = None
    expert_size: float | None = None
    cost_matrix: Path | None = None

    def topology(self) -> Topology:
        """The topology that the options describe. Raises InputError unless it is given in exactly one way."""
        others = self.gpus is not None or self.topology_file is not None
        if self.cost_matrix is not None:
            if others:
                raise InputError(
                    "--cost-matrix says how many GPUs there are; leave out --gpus and --topology"
                )
            return load_cost_matrix(self.cost_matrix, self.nodes)
        if not others:
            raise InputError("give the GPUs by --gpus (and --nodes), by --topology or by --cost-matrix")
        if self.gpus is not None and self.topology_file is not None:
            raise InputError("give the GPUs either by --gpus (and --nodes) or by --topology")
        if self.topology_file is not None:
            return load_topology(self.topology_file)
        return topology_of(self.gpus or 1, self.nodes)

    def check_memory(self, trace: RoutingTrace, num_ranks: int) -> None:
        """Raise InputError if the experts of a rank need more than gpu_memory."""
        if self.gpu_memory is None or self.expert_size is None:
            return
        slots = equal_slots(trace.num_experts + self.redundant_experts, num_ranks) // num_ranks
        needed = slots * trace.num_layers * self.expert_size / 1024
        if not needed <= self.gpu_memory:
            raise InputError(
                f"--gpu-memory {self.gpu_memory:g}: {slots} experts in {trace.num_layers} layers take "
                f"{needed:.1f} GiB a GPU; use more GPUs or fewer redundant experts"
            )


@dataclass(frozen=True)
class Goal:
    """The engine, hardware and batch that run the plan, on which the time of a step depends.

    objective: "time" or "messages". model: None means the model that the trace names. batch: None means
    BATCH, or PREFILL_BATCH for the phase prefill. keep_groups: routing groups that stay together.
    """

    objective: str = "time"
    target: str = "exflow"
    strategy: str | None = None
    machine: str = DEFAULT
    model: str | None = None
    batch: int | None = None
    keep_groups: int = 1

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective {self.objective!r} is unknown; give {' or '.join(OBJECTIVES)}")

    def serving(self, trace: RoutingTrace, phase: str = "all") -> Serving:
        """The serving setting. Raises InputError for unknown or contradictory options."""
        target = target_named(self.target)
        strategy = target.strategy or suited(trace.top_k)
        if self.strategy is not None:
            strategy = Objective(self.strategy).strategy  # type: ignore[arg-type]  # refuses an unknown one
            if target.strategy not in (None, strategy):
                raise InputError(
                    f"strategy {strategy}: {target.name} runs {target.strategy}; leave the strategy out, or "
                    "place for exflow"
                )
        sizes = sizes_for_trace(trace.model) if self.model is None else sizes_of(self.model)
        batch = PREFILL_BATCH if phase == "prefill" else BATCH
        machine = machine_named(self.machine)
        return Serving(target.name, strategy, machine, sizes, batch if self.batch is None else self.batch)

    def check_slots(self, redundant_experts: int) -> None:
        """Raise InputError if the target cannot hold the replicas asked for."""
        if redundant_experts and target_named(self.target).rule is None:
            raise InputError(
                f"redundant experts {redundant_experts}: {self.target} holds no replicas; leave them out"
            )


@dataclass(frozen=True)
class PlaceJob:
    """Arguments of the command; see `exflow place --help`."""

    traces: list[Path]
    phase: str
    where: Where
    goal: Goal
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
    """A plan with the requested tables, ready for JSON. notes: what the user should know, in sentences."""

    plan: Plan
    notes: list[str]
    pareto: list[dict[str, Any]] | None = None
    learning_curve: list[dict[str, Any]] | None = None
    verdict: str | None = None
    by_trace: dict[str, float] | None = None  # messages per token and layer on each of several traces


def run_place(job: PlaceJob, tell: Tell) -> Placement:
    """Make the plan. Raises InputError if settings contradict each other or the traces.

    job.solving.stop is asked before a further search begins; it is set by Ctrl-C.
    """
    _check(job)
    topology = job.where.topology()
    traces = [_load(path, job.phase) for path in job.traces]
    job.where.check_memory(traces[0], topology.num_ranks)
    held_out = []
    if job.holdout is not None:
        halves = [split_by_sequence(trace, job.holdout) for trace in traces]
        traces, held_out = [train for train, _ in halves], [test for _, test in halves]

    tables: dict[str, Any] = {}
    if job.goal.objective == "time":
        plan = _place_for_time(job, traces, held_out, topology, tell)
    elif job.pareto:
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
        plan = replace(
            plan, expected=plan.expected | {"held_out": figures | plan.expected.get("held_out", {})}
        )
    if len(traces) > 1:
        judged = held_out or traces
        names = [str(path) for path in job.traces]
        tables["by_trace"] = dict(zip(names, [messages(plan, each) for each in judged], strict=True))
    return Placement(plan, list(notes_on(plan, job.where.redundant_experts)), **tables)


def _load(path: Path, phase: str) -> RoutingTrace:
    try:
        return RoutingTrace.load(path).of_phase(phase)
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error


def _place_for_time(
    job: PlaceJob,
    traces: Sequence[RoutingTrace],
    held_out: Sequence[RoutingTrace],
    topology: Topology,
    tell: Tell,
) -> Plan:
    job.goal.check_slots(job.where.redundant_experts)
    serving = job.goal.serving(traces[0], job.phase)
    plan = place_for_time(
        traces,
        topology,
        serving,
        seed=job.solving.seed,
        time_limit=job.solving.time_limit,
        redundant_experts=job.where.redundant_experts,
        keep_groups=job.goal.keep_groups,
        method=job.solving.method,
        tell=tell,
        stop=job.solving.stop,
    )
    if not held_out:
        return plan
    others = references(merge(traces), topology, serving.strategy, plan.num_slots)
    figures = compared(plan, others, merge(held_out), serving)
    return replace(plan, expected=plan.expected | {"held_out": {"time": figures}})


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
