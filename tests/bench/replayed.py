"""Routing and placements for a benchmark of few steps."""

from dataclasses import replace

import numpy as np

from exflow.model.config import ModelConfig
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import default_plan

COUNTED = 8  # steps: 3 of warm-up, 5 timed; as many as a sequence of the trace has rows


def trace_of(config: ModelConfig) -> RoutingTrace:
    """Make a trace of 4 sequences with a row for every counted step."""
    rng = np.random.default_rng(0)
    layers = len(config.moe_layer_ids)
    experts = rng.permuted(np.tile(np.arange(config.num_experts), (4 * COUNTED, layers, 1)), axis=2)
    return RoutingTrace.from_arrays(
        experts[:, :, : config.top_k],
        num_experts=config.num_experts,
        sequence=np.repeat(np.arange(4), COUNTED),
        model=config.name,
    )


def shuffled_plan(config: ModelConfig) -> Plan:
    plan = default_plan(config, Topology(gpus_per_node=2))
    order = np.random.default_rng(1).permuted(plan.physical_to_logical_map, axis=1)
    return replace(plan, physical_to_logical_map=order, method="random")
