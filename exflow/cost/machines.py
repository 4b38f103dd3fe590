"""Documented machines, machines from files, and the times of a decode step that they give."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from exflow.comm.capacity import ROUND_BYTES
from exflow.cost.auto import traffic_by_strategy
from exflow.cost.batches import DrawnBatches
from exflow.cost.predict import Prediction, predict
from exflow.cost.workload import Workload
from exflow.errors import InputError
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.placement.plan.plan import Plan
from exflow.placement.time.machine import Link, Machine
from exflow.placement.time.machines import load_machine
from exflow.profiling.trace import RoutingTrace

_ITEMSIZE = 2  # bfloat16

# Measured on H200s of one host (docs/decode.md): one-sided writes here, captured NCCL below. The extra
# time of a layer is fitted to measured steps (docs/simulate.md). configs/machines has both machines, too.
_ONE_NODE = Machine(
    inside=Link(3.6e-6, 170e9),
    between=Link(0.0, math.inf),
    read_bytes_per_s=4.1e12,
    memory_bytes=140e9,
    layer_s=35e-6,
    round_bytes=ROUND_BYTES["cuda"],
    transport="one-sided",
    flops_per_s=600e12,
)
# Links between nodes were not measured: a network card of 400 Gbit/s for each GPU is assumed.
_SEVERAL_NODES = Machine(
    inside=Link(9e-6, 190e9),
    between=Link(20e-6, 40e9, peer_s=1e-6),
    read_bytes_per_s=4.1e12,
    memory_bytes=140e9,
    layer_s=35e-6,
    round_bytes=ROUND_BYTES["cuda"],
    hides=0.0,  # a captured collective waits for earlier kernels of its stream
    transport="collective",
    flops_per_s=600e12,
)


@dataclass(frozen=True)
class StepTime:
    """The predicted time of a step under a strategy. fits: True if it fits into the machine's memory."""

    prediction: Prediction
    fits: bool
    machine: Machine

    def as_json(self) -> dict[str, Any]:
        return asdict(self.prediction) | {
            "step_s": self.prediction.step_s,
            "fits": self.fits,
            "machine": _finite(asdict(self.machine)),
        }


@dataclass(frozen=True)
class Setting:
    """A decode step to predict: `batch` sequences of `context` positions, of a model on a machine.

    machine: None means the documented machine for the number of nodes.
    """

    model: ModelConfig
    batch: int
    context: int
    machine: Machine | None

    def machine_for(self, plan: Plan) -> Machine:
        return self.machine or (_ONE_NODE if plan.topology.num_nodes == 1 else _SEVERAL_NODES)

    def as_json(self) -> dict[str, Any]:
        return {"model": self.model.name, "batch": self.batch, "context": self.context, "itemsize": _ITEMSIZE}

    def step_times(
        self, plan: Plan, strategies: Mapping[str, dict[str, Any]], trace: RoutingTrace
    ) -> tuple[StepTime, ...]:
        """The times of every strategy in `strategies`, the figures of `evaluate` on `trace` by strategy."""
        machine = self.machine_for(plan)
        workload = Workload.of(self.model, plan, self.batch, self.context, _ITEMSIZE)
        found = []
        for strategy, traffic in traffic_by_strategy(strategies, plan):
            drawn = DrawnBatches(plan, trace, strategy).of(workload.tokens_per_rank)
            prediction = predict(strategy, workload, replace(traffic, drawn=drawn), machine)
            found.append(StepTime(prediction, prediction.memory_bytes <= machine.memory_bytes, machine))
        return tuple(found)


def load_setting(
    folder: Path, batch: int, context: int, machine: Path | None, trace: RoutingTrace
) -> Setting:
    """Read a model's and a machine's files; raises InputError if one is wrong, or the trace fits no model."""
    config = load_model_config(folder)
    for what, ours, theirs in (
        ("experts", config.num_experts, trace.num_experts),
        ("top_k", config.top_k, trace.top_k),
        ("MoE layers", list(config.moe_layer_ids), list(trace.moe_layer_ids)),
    ):
        if ours != theirs:
            raise InputError(
                f"{folder}: the model has {what} {ours}, the trace {theirs}; give the trace's own model"
            )
    return Setting(config, batch, context, None if machine is None else load_machine(machine))


def _finite(value: Any) -> Any:
    """`value` with null for infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if value == math.inf else value
