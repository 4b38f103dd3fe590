"""Evaluates a plan on a trace: traffic of every strategy, locality and balance; `exflow evaluate`."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.traffic.traffic import (
    Traffic,
    count_traffic,
    follow,
    imbalance_of,
    local_fraction,
    total,
)
from exflow.profiling.trace import RoutingTrace


def evaluate(plan: Plan, trace: RoutingTrace) -> dict[str, Any]:
    """The figures that `exflow evaluate --json` prints, ready for JSON.

    Under "strategies" each strategy has, as means per token and MoE layer, "messages_per_token_layer" (which
    is "intra_node" + "inter_node", and also "dispatch" + "return"); "kv_copies" per token and attention layer
    (background); "exchanges_per_step", the synchronous collectives of a decode step; and "totals", the
    integers behind the means. "remote_nodes" is how many nodes other than the owner's a token's experts are
    on, and "hierarchical", with several nodes of several ranks, the messages where each of them gets one and
    passes it on (see `count_traffic`). "imbalance" is the busiest rank's load over the mean load, per layer,
    its mean and its maximum; "owner_imbalance" is the ratio for the tokens that a rank owns before each MoE
    layer and after the last: it attends to them, and sends them out. "node_coherent" is there only with
    several nodes. "replicated" sends no message: its "all_reduces_per_step" each move "all_reduce_copies"
    rows a token, all ranks together (a ring: every rank sends 2 (G - 1) / G of a row), on the critical path.

    "local_fraction" is the share of adjacent-layer first-choice transitions that stay on a rank; it is 1 for
    a single MoE layer. The imbalance of the strategy that the plan was made for stands beside the strategies
    too; without replicas it is the same for all. All rows of the trace count. Raises InputError if the trace
    is empty or of another model than the plan.
    """
    plan.check_trace(trace)
    if not trace.num_tokens:
        raise InputError("the trace has no tokens to evaluate the plan on; choose one that has")
    local, strategies = local_fraction(trace, plan), _strategies(plan, trace)
    return {
        "model": plan.model,
        "method": plan.method,
        "tokens": trace.num_tokens,
        "layers": plan.num_layers,
        "top_k": trace.top_k,
        "experts": plan.num_experts,
        "ranks": plan.num_ranks,
        "nodes": plan.topology.num_nodes,
        "slots": plan.num_slots,
        "strategies": strategies,
        "local_fraction": float(local.mean()) if len(local) else 1.0,
        "imbalance": strategies[plan.strategy.key]["imbalance"],
    }


def own_figures(plan: Plan) -> dict[str, Any]:
    """The plan's expected figures for the strategy that it was made for."""
    figures: dict[str, Any] = plan.expected["strategies"][plan.strategy.key]
    return figures


def exchanges_per_step(num_layers: int, top_k: int, group_size: int, num_ranks: int) -> int:
    """All-to-alls of a decode step: one a MoE layer where a token can stay at its only expert, else two."""
    return num_layers if top_k == 1 and group_size == num_ranks else 2 * num_layers


def _strategies(plan: Plan, trace: RoutingTrace) -> dict[str, dict[str, Any]]:
    ranks, layers = plan.num_ranks, plan.num_layers
    counted = [Strategy.DISPATCH_COMBINE, Strategy.COHERENT]
    if plan.topology.num_nodes > 1 or plan.strategy == Strategy.NODE_COHERENT:
        counted.append(Strategy.NODE_COHERENT)
    group_sizes = {each.key: each.group_size(ranks, plan.topology.gpus_per_node) for each in counted}
    may_relay = 1 < plan.topology.num_nodes < ranks
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        direct = pool.map(lambda size: follow(trace, plan, size), group_sizes.values())
        by_relays = pool.map(
            lambda size: count_traffic(trace, plan, size, hierarchical=True),
            group_sizes.values() if may_relay else (),
        )
        followed = dict(zip(group_sizes, direct, strict=True))
        relayed = dict(zip(group_sizes, by_relays, strict=False))
    figures: dict[str, dict[str, Any]] = {}
    for name, size in group_sizes.items():
        traffic = total(followed[name], plan, size)
        figures[name] = _figures(traffic, exchanges_per_step(layers, trace.top_k, size, ranks)) | {
            "remote_nodes": traffic.per_token_layer(int(followed[name].remote_nodes.sum())),
            "imbalance": _imbalance(followed[name].load.sum(axis=0)),
            "owner_imbalance": _imbalance(followed[name].owned),
        }
        if name in relayed:
            figures[name]["hierarchical"] = {
                "intra_node": relayed[name].per_token_layer(relayed[name].intra_node),
                "inter_node": relayed[name].per_token_layer(relayed[name].inter_node),
            }
    silent = Traffic(trace.num_tokens, layers, plan.num_hidden_layers, 0, 0, 0, 0, 0, 0)
    figures["replicated"] = _figures(silent, layers) | {
        "all_reduces_per_step": layers,
        "all_reduce_copies": 2 * (ranks - 1),
        "imbalance": figures["dispatch_combine"]["imbalance"],
        "owner_imbalance": {"mean": 1.0, "max": 1.0, "per_layer": [1.0] * (layers + 1)},
    }
    return figures


def _imbalance(load: npt.NDArray[np.int64]) -> dict[str, Any]:
    layers = imbalance_of(load)
    return {"mean": float(layers.mean()), "max": float(layers.max()), "per_layer": layers.tolist()}


def _figures(traffic: Traffic, exchanges: int) -> dict[str, Any]:
    return {
        "messages_per_token_layer": traffic.per_token_layer(traffic.messages),
        "intra_node": traffic.per_token_layer(traffic.intra_node),
        "inter_node": traffic.per_token_layer(traffic.inter_node),
        "dispatch": traffic.per_token_layer(traffic.dispatched),
        "return": traffic.per_token_layer(traffic.returned),
        "kv_copies": traffic.per_token_attention(traffic.kv_intra + traffic.kv_inter),
        "kv_intra_node": traffic.per_token_attention(traffic.kv_intra),
        "kv_inter_node": traffic.per_token_attention(traffic.kv_inter),
        "exchanges_per_step": exchanges,
        "totals": {
            "messages": traffic.messages,
            "dispatch_intra": traffic.dispatch_intra,
            "dispatch_inter": traffic.dispatch_inter,
            "return_intra": traffic.return_intra,
            "return_inter": traffic.return_inter,
            "kv_intra": traffic.kv_intra,
            "kv_inter": traffic.kv_inter,
        },
    }
