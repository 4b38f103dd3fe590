"""Strategy `auto`: measure the ranks once, predict every strategy, take the fastest that fits. Collective."""

from dataclasses import replace
from typing import Any

import numpy as np

from exflow.comm.transport import Transport
from exflow.cost.predict import Load, Machine, Moved, Prediction, choose, predict
from exflow.cost.probe import measure
from exflow.job.cluster import Cluster
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import NAMES, Name
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

GUESSED_TOKENS = 512


def choose_strategy(
    load: Load, plan: Plan, cluster: Cluster, transport: Transport = "eager"
) -> tuple[Name, str]:
    """The strategy for `load` on these ranks and why, equal on all of them; every rank must call it.

    A plan for other nodes than these is judged as one whose figures are not known. Raises InputError on all
    ranks alike if no strategy fits into memory.
    """
    here = Topology(num_nodes=cluster.num_nodes, gpus_per_node=cluster.ranks_per_node)
    if (plan.topology.num_nodes, plan.num_ranks) != (here.num_nodes, here.num_ranks):
        plan = replace(plan, topology=here, expected={})
    machine = measure(cluster, transport)
    return choose(predictions(load, plan, machine), machine.memory_bytes)


def predictions(load: Load, plan: Plan, machine: Machine) -> list[Prediction]:
    """What each strategy takes, by the figures that the plan expects of its own trace."""
    figures = expected_figures(plan, load.top_k)
    sizes = {"dispatch-combine": 1, "node-coherent": load.ranks_per_node, "coherent": load.ranks}
    return [
        predict(name, load, Moved.of(figures[name.replace("-", "_")], sizes.get(name, 1)), machine)
        for name in NAMES
        if name.replace("-", "_") in figures
    ]


def expected_figures(plan: Plan, top_k: int) -> dict[str, Any]:
    """By strategy what the plan expects; of a plan that does not say, what it does to random routing."""
    if "strategies" in plan.expected:
        stored: dict[str, Any] = plan.expected["strategies"]
        return stored
    from exflow.placement.traffic.evaluate import (
        evaluate,  # compiled: not needed with a plan that knows its figures
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


def moved_by(plan: Plan, trace: RoutingTrace, group_size: int) -> Moved:
    """What any group size moves on a trace, by the same count."""
    from exflow.placement.traffic.evaluate import exchanges_per_step
    from exflow.placement.traffic.traffic import follow, imbalance_of, total

    followed = follow(trace, plan, group_size)
    traffic = total(followed, plan, group_size)
    return Moved(
        group_size=group_size,
        exchanges=exchanges_per_step(plan.num_layers, trace.top_k, group_size, plan.num_ranks),
        dispatch=(
            traffic.per_token_layer(traffic.dispatch_intra),
            traffic.per_token_layer(traffic.dispatch_inter),
        ),
        give_back=(
            traffic.per_token_layer(traffic.return_intra),
            traffic.per_token_layer(traffic.return_inter),
        ),
        kv=(traffic.per_token_attention(traffic.kv_intra), traffic.per_token_attention(traffic.kv_inter)),
        busiest=float(imbalance_of(followed.load.sum(axis=0)).mean()),
        attending=float(imbalance_of(followed.owned).mean()) if group_size > 1 else 1.0,
    )
