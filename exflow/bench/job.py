"""What `exflow bench decode` is asked to run, checked and read before anything runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from exflow.comm.transport import NAMES as TRANSPORTS
from exflow.comm.transport import Transport
from exflow.errors import InputError
from exflow.files import check_writable
from exflow.job.launch import PATIENCE_S
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.device import choose_device, dtype_named
from exflow.model.random_weights import RandomWeights
from exflow.model.replay import check_replay
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import plan_for
from exflow.runtime.strategies import strategy_named

WARM_UP = 3  # steps that are run and counted, but not timed
CONTEXT = 512
ONE_PROCESS = "single-process"
CONTIGUOUS = "contiguous"


@dataclass(frozen=True)
class BenchJob:
    """The arguments of the command; empty lists and None stand for the defaults."""

    model: Path
    plans: list[Path]
    strategies: list[str]
    transports: list[str]
    batches: list[int]
    context: int | None
    steps: int
    replay: Path | None
    dtype: str | None
    device: str | None
    output: Path | None
    patience_s: float = PATIENCE_S

    def check(self, nproc: int | None) -> None:
        """Find what is at fault without starting the ranks, of one node. Raises InputError."""
        Setting.of(self, None if nproc is None else Topology(gpus_per_node=nproc))
        if self.output is not None:
            check_writable(self.output)


@dataclass(frozen=True)
class Setting:
    """A job's arguments checked and read, alike on all ranks; `notes` are what to tell about them.

    topology: None in a single process, which has no strategies. positions: that a sequence may have.
    """

    config: ModelConfig
    weights: Path | RandomWeights
    topology: Topology | None
    plans: dict[str, Plan]
    strategies: list[str]
    transports: list[Transport]
    batches: list[int]
    context: int
    steps: int
    trace: RoutingTrace | None
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, job: BenchJob, topology: Topology | None) -> Self:
        """Raises InputError for whatever the ranks of `topology` could not run."""
        config, device, notes = load_model_config(job.model), choose_device(job.device), list[str]()
        return cls(
            config,
            _weights(job.model, config, notes),
            topology,
            _plans(job, topology, notes),
            _strategies(job.strategies, topology),
            _transports(job.transports, device.type, topology),
            list(dict.fromkeys(job.batches or [16])),
            _context(job, config, notes),
            job.steps,
            _trace(job, config, notes),
            dtype_named(job.dtype or ("bfloat16" if device.type == "cuda" else "float32")),
            notes,
        )

    @property
    def counted(self) -> int:
        """Steps that a case runs."""
        return WARM_UP + self.steps

    @property
    def positions(self) -> int:
        return self.context + self.counted + 1


def _weights(model: Path, config: ModelConfig, notes: list[str]) -> Path | RandomWeights:
    if any(model.glob("*.safetensors*")):
        return model
    notes.append(f"{model}: holds no weights; they are drawn at random")
    return RandomWeights(config)


def _plans(job: BenchJob, topology: Topology | None, notes: list[str]) -> dict[str, Plan]:
    """By their names in the table: the contiguous plan, then those given."""
    if topology is None and job.plans:
        raise InputError(f"--plan {job.plans[0]}: one process holds all experts; add --nproc N")
    here = topology or Topology(gpus_per_node=1)
    stems = [path.stem for path in job.plans]
    clear = len({CONTIGUOUS, *stems}) == len(stems) + 1
    plans = {}
    for path in job.plans:
        plan = plans[path.stem if clear else str(path)] = plan_for(job.model, path, here)
        if plan.topology.num_nodes != here.num_nodes:
            notes.append(f"{path}: the plan is for {plan.topology}, these are {here}")
    try:
        return {CONTIGUOUS: plan_for(job.model, None, here), **plans}
    except InputError as error:
        if not plans:
            raise
        notes.append(f"there is no contiguous placement: {error}")
        return plans


def _strategies(names: list[str], topology: Topology | None) -> list[str]:
    if topology is None:
        if names:
            raise InputError(f"--strategy {names[0]}: one process has no strategy; add --nproc N")
        return [ONE_PROCESS]
    if "auto" in names:
        raise InputError(
            "--strategy auto: stands for one of the others, the last line says for which; leave it out"
        )
    between = ["node-coherent"] if topology.num_nodes > 1 else []
    wanted = names or ["dispatch-combine", "coherent", *between, "replicated"]
    return list(dict.fromkeys(strategy_named(name, topology.num_nodes) for name in wanted))


def _transports(names: list[str], device_type: str, topology: Topology | None) -> list[Transport]:
    """Those asked for; none: those that work."""
    for name in names:
        if name not in TRANSPORTS:
            raise InputError(f"--transport {name}: no such transport; give {', '.join(TRANSPORTS)}")
        if name != "eager" and device_type != "cuda":
            raise InputError(f"--transport {name}: needs GPUs; give eager, or --device cuda")
        if name in ("collective", "relayed") and topology is None:  # nor is there a process group
            raise InputError(f"--transport {name}: one process exchanges nothing; give one-sided or eager")
    return [known for name in dict.fromkeys(names) for known in TRANSPORTS if known == name]


def _context(job: BenchJob, config: ModelConfig, notes: list[str]) -> int:
    most = config.max_positions - (WARM_UP + job.steps + 1)
    if most < 1:
        raise InputError(
            f"--steps {job.steps}: with {WARM_UP} steps of warm-up they exceed the model's "
            f"{config.max_positions} positions; give {config.max_positions - WARM_UP - 2} at most"
        )
    if job.context is None:
        if most < CONTEXT:
            notes.append(f"--context is {most}: the model has {config.max_positions} positions")
        return min(CONTEXT, most)
    if job.context > most:
        raise InputError(
            f"--context {job.context}: with {WARM_UP + job.steps} steps it exceeds the model's "
            f"{config.max_positions} positions; give {most} at most, or lower --steps"
        )
    return job.context


def _trace(job: BenchJob, config: ModelConfig, notes: list[str]) -> RoutingTrace | None:
    if job.replay is None:
        if job.plans:
            notes.append(
                "without --replay gates route what noise in the cache leads to, not what the plans are for"
            )
        return None
    trace = RoutingTrace.load(job.replay)
    try:
        check_replay(trace, config)
    except InputError as error:
        raise InputError(f"{job.replay}: {error}") from error
    return trace
