"""Strategy `auto`: measures the ranks once, predicts every strategy, and takes the fastest that fits."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from exflow.comm.transport_names import Transport
from exflow.cost.predict import Prediction, choose, predict
from exflow.cost.probe import measure
from exflow.cost.workload import BatchCounts, StepTraffic, Workload
from exflow.job.cluster import Cluster
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machine import Machine
from exflow.profiling.trace import RoutingTrace

GUESSED_TOKENS = 512


def choose_strategy(
    workload: Workload, plan: Plan, cluster: Cluster, transport: Transport = "eager"
) -> tuple[Strategy, str]:
    """The fastest strategy for `workload` on these ranks, and the reason; equal on all ranks. Collective.

    A plan's figures are ignored if it was made for other nodes. Raises InputError on all ranks if no strategy
    fits into memory.
    """
    here = Topology(num_nodes=cluster.num_nodes, gpus_per_node=cluster.ranks_per_node)
    if (plan.topology.num_nodes, plan.num_ranks) != (here.num_nodes, here.num_ranks):
        plan = replace(plan, topology=here, expected={})
    machine = measure(cluster, transport)
    return choose(predictions(workload, plan, machine), machine.memory_bytes)


def predictions(workload: Workload, plan: Plan, machine: Machine) -> list[Prediction]:
    """The time of a step under each strategy, with the traffic that the plan expects."""
    figures = expected_figures(plan, workload.top_k)
    drawn = expected_counts(plan, workload.tokens_per_rank)
    return [
        predict(each, workload, replace(traffic, drawn=drawn.get(each)), machine)
        for each, traffic in traffic_by_strategy(figures, plan)
    ]


def expected_counts(plan: Plan, tokens_per_rank: int) -> dict[Strategy, BatchCounts]:
    """Counts of drawn batches by strategy; empty unless the plan was made for batches of this size.

    The plan stores those of its own strategy. Other strategies have the same load of experts, other rows.
    """
    made_for, time = plan.expected.get("made_for", {}), plan.expected.get("time", {})
    if made_for.get("batch") != tokens_per_rank or "experts_touched" not in time:
        return {}
    own = BatchCounts.of(time)
    return {each: own if each == plan.strategy else replace(own, link_rows=None) for each in Strategy}


def traffic_by_strategy(
    figures: Mapping[str, dict[str, Any]], plan: Plan
) -> Iterator[tuple[Strategy, StepTraffic]]:
    """Yield the traffic of each strategy in `figures`, the result of `evaluate` by strategy key."""
    for each in Strategy:
        if each.key in figures:
            size = each.group_size(plan.num_ranks, plan.topology.gpus_per_node)
            yield each, StepTraffic.of(figures[each.key], size)


def expected_figures(plan: Plan, top_k: int) -> dict[str, Any]:
    """Figures that the plan expects, by strategy. A plan without figures is evaluated on random routing."""
    if "strategies" in plan.expected:
        stored: dict[str, Any] = plan.expected["strategies"]
        return stored
    from exflow.placement.traffic.evaluate import (
        evaluate,  # compiled: not needed with a plan that has figures
    )

    draw = np.random.default_rng(0).random((GUESSED_TOKENS, plan.num_layers, plan.num_experts))
    experts = draw.argpartition(top_k - 1, axis=2)[:, :, :top_k]
    trace = RoutingTrace.from_arrays(
        experts,
        num_experts=plan.num_experts,
        sequence=np.arange(GUESSED_TOKENS) % (8 * plan.num_ranks),
        model=plan.model,
        moe_layer_ids=plan.moe_layer_ids,
        num_hidden_layers=plan.num_hidden_layers,
        experts_per_layer=plan.experts_per_layer,
    )
    guessed: dict[str, Any] = evaluate(plan, trace)["strategies"]
    return guessed


def step_traffic(plan: Plan, trace: RoutingTrace, group_size: int) -> StepTraffic:
    """Count the traffic of a trace under coherence groups of any size."""
    from exflow.placement.traffic.evaluate import exchanges_per_step
    from exflow.placement.traffic.traffic import follow, imbalance_of, total

    followed = follow(trace, plan, group_size)
    traffic = total(followed, plan, group_size)
    return StepTraffic(
        group_size=group_size,
        exchanges=exchanges_per_step(plan.num_layers, trace.top_k, group_size, plan.num_ranks),
        dispatch=(
            traffic.per_token_layer(traffic.dispatch_intra),
            traffic.per_token_layer(traffic.dispatch_inter),
        ),
        combine=(
            traffic.per_token_layer(traffic.return_intra),
            traffic.per_token_layer(traffic.return_inter),
        ),
        kv=(traffic.per_token_attention(traffic.kv_intra), traffic.per_token_attention(traffic.kv_inter)),
        expert_imbalance=float(imbalance_of(followed.load.sum(axis=0)).mean()),
        attention_imbalance=float(imbalance_of(followed.owned).mean()) if group_size > 1 else 1.0,
    )
