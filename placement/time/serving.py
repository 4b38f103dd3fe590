"""The setting in which a plan runs: engine, strategy, machine, model sizes, batch."""

from dataclasses import dataclass, field
from typing import Any

from exflow.errors import InputError
from exflow.placement.plan.replicas import ReplicaRule
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.machines import DEFAULT, NamedMachine, machine_named
from exflow.placement.time.sizes import UNKNOWN, ModelSizes

BATCH, PREFILL_BATCH, CONTEXT = 64, 2048, 1024


@dataclass(frozen=True)
class Target:
    """A program that runs plans.

    strategy  None: the strategy that suits the model (`suited`)
    rule      how it chooses among the replicas of an expert; None: it holds no replicas
    """

    name: str
    strategy: Strategy | None = Strategy.DISPATCH_COMBINE
    rule: ReplicaRule | None = ReplicaRule.NEAREST


TARGETS = {
    each.name: each
    for each in (
        Target("exflow", None, ReplicaRule.TABLE),
        Target("sglang"),
        Target("vllm", rule=ReplicaRule.IN_TURN),
        Target("vllm-ascend", rule=ReplicaRule.BY_RANK),
        Target("tensorrt-llm", rule=ReplicaRule.IN_TURN),
        Target("transformers", rule=None),
        Target("eplb"),
    )
}


def target_named(name: str) -> Target:
    """The target of this name; raises InputError for an unknown one."""
    if name not in TARGETS:
        raise InputError(f"target {name!r} is unknown; give one of {', '.join(TARGETS)}")
    return TARGETS[name]


def suited(top_k: int) -> Strategy:
    """The strategy of our own runtime that suits a model.

    Under COHERENT a token with one expert stays there and saves an exchange a layer. With more experts a
    combine is needed anyway, and every rank would keep all keys and values.
    """
    return Strategy.COHERENT if top_k == 1 else Strategy.DISPATCH_COMBINE


@dataclass(frozen=True)
class Serving:
    """The inputs of a step's time besides plan and routing.

    target   name of who runs the plan
    batch    tokens of each rank in a step
    context  positions that a token attends to; they count only where owners differ from homes
    """

    target: str = "exflow"
    strategy: Strategy = Strategy.DISPATCH_COMBINE
    machine: NamedMachine = field(default_factory=lambda: machine_named(DEFAULT))
    sizes: ModelSizes = UNKNOWN
    batch: int = BATCH
    context: int = CONTEXT

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"batch is {self.batch}; give the tokens of each GPU in a step, 1 or more")

    @property
    def rule(self) -> ReplicaRule:
        """How the target chooses among the replicas of an expert."""
        return target_named(self.target).rule or ReplicaRule.NEAREST

    def as_json(self) -> dict[str, Any]:
        """The setting, as it is stored in a plan that was made for it."""
        return {
            "objective": "time",
            "target": self.target,
            "strategy": str(self.strategy),
            "machine": self.machine.name,
            "model": self.sizes.name,
            "batch": self.batch,
        }
