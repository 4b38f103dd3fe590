"""Chooses, from a trace, which replica serves an owner's tokens, and what to keep in spare slots.

A replica on a rank that a token visits anyway, or on its owner's rank, costs no message. So each owner's
tokens go for an expert to the rank that most of them visit anyway; of equals to the nearest, then to the one
with the least load.

Shapes: T tokens, L MoE layers, K = top_k, E experts, P slots, G ranks.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from exflow.placement.compiled import compiled
from exflow.placement.counts.load import expert_load
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.replicas import with_spare
from exflow.placement.traffic.traffic import owners
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]
Counts = npt.NDArray[np.int64]
_ROUNDS = 3  # replicas that follow each other may take turns for ever


def tuned(plan: Plan, trace: RoutingTrace) -> Iterator[Plan]:
    """Yield the plan with tables of the replica that serves, each made from the visits under the one before.

    The caller judges them: where owners move with the experts, fewer visits in a layer can be more in the
    next.
    """
    load = expert_load(trace)
    for _ in range(_ROUNDS):
        owner, serving = owners(trace, plan, plan.group_size), plan.serving_slot // plan.slots_per_rank
        table = np.zeros((plan.num_layers, plan.num_experts, plan.num_ranks), dtype=np.int64)
        for layer, hosts in enumerate(plan.hosts):
            chosen = np.asarray(trace.experts[:, layer])
            visits = _visits(chosen, owner[:, layer], serving[:, layer], hosts)
            table[layer] = _most_visited(visits, hosts, plan, load[layer])
        plan = replace(plan, serving_rank=table)
        yield plan


def spare_filled(plan: Plan, trace: RoutingTrace, num_slots: int) -> Plan:
    """The plan without replicas `plan`, with more slots, in which ranks hold what they send for most.

    Only the replica that was there before serves; `tuned` lets the others serve.
    """
    owner, ranks = owners(trace, plan, plan.group_size), plan.num_ranks
    everyone = np.repeat(plan.rank_of_expert[..., None], ranks, axis=2)
    slots = []
    for layer, rank_of in enumerate(plan.rank_of_expert):
        sent = _sent_alone(np.asarray(trace.experts[:, layer]), owner[:, layer], rank_of, ranks)
        preferred = np.argsort(-sent.T, axis=1, kind="stable")
        slots.append(with_spare(rank_of, preferred, num_slots // ranks).ravel())
    return Plan.of_slots(
        np.stack(slots),
        plan.topology,
        trace,
        method=plan.method,
        strategy=plan.strategy,
        serving_rank=everyone,
    )


def _most_visited(visits: Counts, hosts: npt.NDArray[np.bool_], plan: Plan, load: Counts) -> Counts:
    """[E, G]: of an expert's hosts the rank with most visits [E, G, G], then the nearest, then the idlest."""
    ranks = plan.num_ranks
    busy = (load / np.maximum(hosts.sum(axis=1), 1)) @ hosts  # [G]
    by_load = np.argsort(np.argsort(busy, kind="stable"))
    values, nearness = np.unique(plan.topology.distance, return_inverse=True)
    order = nearness.reshape(ranks, ranks) * ranks + by_load  # [G, G]
    keys = visits * (len(values) * ranks) - order
    keys[np.broadcast_to(np.logical_not(hosts)[:, None, :], keys.shape)] = np.iinfo(np.int64).min
    return np.asarray(np.where(hosts.any(axis=1, keepdims=True), keys.argmax(axis=2), 0))


@compiled
def _visits(
    chosen: IntArray,  # [T, K]
    owner: IntArray,  # [T]
    serving: IntArray,  # [G, E] ranks
    hosts: npt.NDArray[np.bool_],  # [E, G]
) -> Counts:
    """[E, G, G]: tokens of each owner that choose an expert and are on a host of it anyway, by that host."""
    ranks, top_k = hosts.shape[1], chosen.shape[1]
    visits = np.zeros((len(hosts), ranks, ranks), dtype=np.int64)
    visited = np.zeros(ranks, dtype=np.int64)  # number of choices that lead there
    for token in range(len(chosen)):
        own = owner[token]
        visited[:] = 0
        for choice in range(top_k):
            visited[serving[own, chosen[token, choice]]] += 1
        for choice in range(top_k):
            expert = chosen[token, choice]
            for rank in range(ranks):
                others = visited[rank] - (1 if serving[own, expert] == rank else 0)
                if hosts[expert, rank] and (rank == own or others > 0):
                    visits[expert, own, rank] += 1
    return visits


@compiled
def _sent_alone(chosen: IntArray, owner: IntArray, rank_of: IntArray, ranks: int) -> Counts:
    """[E, G]: tokens that each owner sends to another rank for one expert alone."""
    sent = np.zeros((len(rank_of), ranks), dtype=np.int64)
    for token in range(len(chosen)):
        for expert in chosen[token]:
            there = rank_of[expert]
            alone = there != owner[token]
            for other in chosen[token]:
                alone &= other == expert or rank_of[other] != there
            sent[expert, owner[token]] += int(alone)
    return sent
