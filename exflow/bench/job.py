"""Options of `exflow bench decode`, resolved: files are read and checked before anything runs."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from exflow.comm.transport_names import NAMES as TRANSPORTS
from exflow.comm.transport_names import Transport
from exflow.errors import InputError
from exflow.files import check_writable
from exflow.job.launch import PATIENCE_S
from exflow.model.checkpoint import Checkpoint
from exflow.model.config import ModelConfig
from exflow.model.device import choose_device, dtype_named
from exflow.model.random_weights import RandomWeights
from exflow.model.replay import load_replay
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import AUTO, Strategy
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import plan_for
from exflow.runtime.strategies import strategy_named

WARM_UP = 3  # steps that are run and counted, but not timed
CONTEXT = 512
ONE_PROCESS = "single-process"
CONTIGUOUS = "contiguous"


@dataclass(frozen=True)
class ResolvedBench:
    """A resolved benchmark, passed to each rank: all files are read and checked, except weights and traces.

    topology: None in a single process, which has no strategies. context: cached positions of a sequence.
    replay: a trace folder, whose files each rank maps into memory. notes: lines for the user.
    """

    command: str
    config: ModelConfig
    weights: Checkpoint | RandomWeights
    topology: Topology | None
    plans: dict[str, Plan]
    strategies: list[str]
    transports: list[Transport]
    batches: list[int]
    context: int
    steps: int
    replay: Path | None
    dtype: torch.dtype
    device_type: str
    output: Path | None
    patience_s: float
    notes: list[str]

    @property
    def counted(self) -> int:
        """Number of steps of a case."""
        return WARM_UP + self.steps

    @property
    def positions(self) -> int:
        """Number of positions of a sequence at the end."""
        return self.context + self.counted + 1


@dataclass(frozen=True)
class BenchOptions:
    """Options of the command; empty lists and None stand for the defaults."""

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

    def resolve(self, topology: Topology | None) -> ResolvedBench:
        """Read and check everything for ranks of `topology`; None means one process.

        Raises InputError for options that cannot run there.
        """
        checkpoint, device, notes = Checkpoint.open(self.model), choose_device(self.device), list[str]()
        config = checkpoint.config
        if self.output is not None:
            check_writable(self.output)
        return ResolvedBench(
            command=" ".join(["exflow", *sys.argv[1:]]),
            config=config,
            weights=_weights(checkpoint, notes),
            topology=topology,
            plans=_plans(self, config, topology, notes),
            strategies=_strategies(self.strategies, topology),
            transports=_transports(self.transports, device.type, topology),
            batches=list(dict.fromkeys(self.batches or [16])),
            context=_context(self, config, notes),
            steps=self.steps,
            replay=_replay(self, config, notes),
            dtype=dtype_named(self.dtype or ("bfloat16" if device.type == "cuda" else "float32")),
            device_type=device.type,
            output=self.output,
            patience_s=self.patience_s,
            notes=notes,
        )


def _weights(checkpoint: Checkpoint, notes: list[str]) -> Checkpoint | RandomWeights:
    if any(checkpoint.folder.glob("*.safetensors*")):
        return checkpoint
    notes.append(f"{checkpoint.folder}: holds no weights; they are drawn at random")
    return RandomWeights(checkpoint.config)


def _plans(
    options: BenchOptions, config: ModelConfig, topology: Topology | None, notes: list[str]
) -> dict[str, Plan]:
    """Plans by their names in the table: the contiguous plan, then the given ones."""
    if topology is None and options.plans:
        raise InputError(f"--plan {options.plans[0]}: one process holds all experts; add --nproc N")
    here = topology or Topology(gpus_per_node=1)
    stems = [path.stem for path in options.plans]
    clear = len({CONTIGUOUS, *stems}) == len(stems) + 1
    plans = {}
    for path in options.plans:
        plan = plans[path.stem if clear else str(path)] = plan_for(config, path, here)
        if plan.topology.num_nodes != here.num_nodes:
            notes.append(f"{path}: the plan is for {plan.topology}, these are {here}")
    try:
        return {CONTIGUOUS: plan_for(config, None, here), **plans}
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
    if AUTO in names:
        raise InputError(
            "--strategy auto: stands for one of the others, the last line says for which; leave it out"
        )
    differ = [each for each in Strategy if topology.num_nodes > 1 or each != Strategy.NODE_COHERENT]
    for name in names:
        strategy_named(name, topology.num_nodes)
    return list(dict.fromkeys(map(Strategy, names or differ)))


def _transports(names: list[str], device_type: str, topology: Topology | None) -> list[Transport]:
    """The transports asked for, in the order of TRANSPORTS; an empty list means all that work."""
    for name in names:
        if name not in TRANSPORTS:
            raise InputError(f"--transport {name}: no such transport; give {', '.join(TRANSPORTS)}")
        if name != "eager" and device_type != "cuda":
            raise InputError(f"--transport {name}: needs GPUs; give eager, or --device cuda")
        if name in ("collective", "relayed") and topology is None:  # and there is no process group
            raise InputError(f"--transport {name}: one process exchanges nothing; give one-sided or eager")
    return [known for name in dict.fromkeys(names) for known in TRANSPORTS if known == name]


def _context(options: BenchOptions, config: ModelConfig, notes: list[str]) -> int:
    most = config.max_positions - (WARM_UP + options.steps + 1)
    if most < 1:
        raise InputError(
            f"--steps {options.steps}: with {WARM_UP} steps of warm-up they exceed the model's "
            f"{config.max_positions} positions; give {config.max_positions - WARM_UP - 2} at most"
        )
    if options.context is None:
        if most < CONTEXT:
            notes.append(f"--context is {most}: the model has {config.max_positions} positions")
        return min(CONTEXT, most)
    if options.context > most:
        raise InputError(
            f"--context {options.context}: with {WARM_UP + options.steps} steps it exceeds the model's "
            f"{config.max_positions} positions; give {most} at most, or lower --steps"
        )
    return options.context


def _replay(options: BenchOptions, config: ModelConfig, notes: list[str]) -> Path | None:
    if options.replay is not None:
        load_replay(options.replay, config)
    elif options.plans:
        notes.append(
            "without --replay gates route what noise in the cache leads to, not what the plans are for"
        )
    return options.replay
