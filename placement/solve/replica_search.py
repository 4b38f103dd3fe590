"""Search for the replicas of least time, where every token comes home after each layer (dispatch-combine).

In each layer annealed moves exchange experts, replace a replica by one of another expert and, where the plan
has a table of its own, let another replica serve. Which replica serves follows the rule of who runs the plan.

Shapes: T tokens, L MoE layers, K = top_k, E experts, P slots, G ranks, S = P / G, C = G * W classes of W
turns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exflow.placement.plan.replicas import ReplicaRule, serving_slots
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.layer_rounds import SUM, Tell, in_two_rounds, sampled
from exflow.placement.solve.replica_swaps import EMPTY, Counts, IntArray, Rule, anneal_replicas
from exflow.placement.solve.time_swaps import LEVELS
from exflow.placement.solve.time_weights import weights_of
from exflow.placement.time.serving import Serving
from exflow.profiling.trace import RoutingTrace

_TRIALS = 20  # of each slot at a temperature
_MOST_TOKENS = 12_000


@dataclass(frozen=True, eq=False)
class Start:
    """Where a search begins: the expert in each slot [L, P], every slot filled.

    serving_rank [L, E, G]: the rank that serves, for a plan with a table of its own; None: as the rule says.
    """

    slots: IntArray
    serving_rank: IntArray | None = None


@dataclass(frozen=True, eq=False)
class Replicas:
    """The expert in each slot [L, P], and the rank that serves [L, E, G] or None."""

    slots: Counts
    serving_rank: Counts | None


def search_for_replicas(
    trace: RoutingTrace,
    topology: Topology,
    serving: Serving,
    starts: Sequence[Start],
    *,
    seed: int = 0,
    time_limit: float = math.inf,
    tell: Tell = lambda what: None,
) -> Replicas:
    """Place replicas, beginning with the best of `starts` in each layer; see `search_for_time`."""
    experts, ranks = sampled(trace, _MOST_TOKENS), topology.num_ranks
    free = serving.rule == ReplicaRule.TABLE
    per_layer = [_starts_of(layer, trace, topology, serving, starts) for layer in range(trace.num_layers)]
    turns = per_layer[0][1].shape[2] // ranks
    rule = Rule(free, free or serving.rule == ReplicaRule.NEAREST, turns, topology.gpus_per_node)

    def anneal_layer(layer: int, share: float, round_seed: int) -> tuple[Counts, Counts]:
        slots, tables = per_layer[layer]
        chosen = np.ascontiguousarray(experts[:, layer])
        weights = weights_of(chosen, tables.shape[1], topology, serving)
        parts = np.arange(tables.shape[2] + 1) / tables.shape[2]
        best_slots, best_table = anneal_replicas(
            chosen,
            slots,
            tables,
            rule,
            weights.prices_by_link(),
            weights.tokens / len(chosen),
            np.stack([weights.work(part) for part in parts], axis=1),
            max(1, int(share * _TRIALS * slots[0].size)),
            round_seed * trace.num_layers + layer,
        )
        return best_slots[None], best_table[None]

    # a move looks at the tokens of two experts, and is taken back more often than not
    tokens = 4 * experts[:, 0].size / trace.num_experts
    moves = trace.num_layers * LEVELS * _TRIALS * starts[0].slots.shape[1]
    work = moves * (tokens + SUM * (ranks + per_layer[0][1].shape[2]))
    in_two_rounds(anneal_layer, per_layer, work, seed, time_limit, tell)
    slots = np.stack([_filled(found[0], tables[0]) for found, tables in per_layer])
    if not free:
        return Replicas(slots, None)
    table = np.zeros((trace.num_layers, trace.num_experts, ranks), dtype=np.int64)
    for layer, (_, tables) in enumerate(per_layer):
        table[layer, : tables.shape[1]] = tables[0]
    return Replicas(slots, table)


def _starts_of(
    layer: int, trace: RoutingTrace, topology: Topology, serving: Serving, starts: Sequence[Start]
) -> tuple[Counts, Counts]:
    """The slots [I, G, S] and tables [I, E, C] of a layer's starts."""
    num_experts = trace.experts_per_layer[layer]
    slots, tables = [], []
    for start in starts:
        row = start.slots[layer]
        per_rank = len(row) // topology.num_ranks
        slots.append(row.reshape(topology.num_ranks, per_rank))
        if start.serving_rank is not None:
            tables.append(start.serving_rank[layer, :num_experts])
        else:
            served = serving_slots(row[None], num_experts, topology, serving.rule)[:, :, 0]  # [W, G, E]
            tables.append((served // per_rank).transpose(2, 1, 0).reshape(num_experts, -1))
    return np.stack(slots).astype(np.int64), np.ascontiguousarray(np.stack(tables), dtype=np.int64)


def _filled(slots: Counts, table: Counts) -> Counts:
    """[P]: the experts in the slots [G, S]; an empty slot gets the first expert that its rank lacks."""
    full = slots.copy()
    for row in full:
        for place in np.flatnonzero(row == EMPTY):
            lacking = np.setdiff1d(np.arange(len(table)), row)
            row[place] = lacking[0] if len(lacking) else 0
    return full.ravel()
