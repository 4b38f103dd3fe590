"""The balance command: makes a plan from expert loads alone, for engines that do not record routing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.load_only import load_only
from exflow.profiling.importers.loads import read_loads


def run_balance(
    files: list[Path],
    topology: Topology,
    redundant_experts: int,
    name: str,
    output: Path,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Place by the sum of the files' loads and save the plan. Returns its balance, for printing.

    advance: called with the number of files read, and of all files.
    """
    loads = []
    for file in files:
        loads.append(load := read_loads(file))
        advance(len(loads), len(files))
        if load.shape != loads[0].shape:
            raise InputError(
                f"{file}: counts {load.shape[0]} layers of {load.shape[1]} experts, {files[0]} "
                f"{loads[0].shape[0]} of {loads[0].shape[1]}; give files of one model"
            )
    plan, busiest = plan_of_loads(np.sum(loads, axis=0), topology, redundant_experts, name)
    plan.save(output)
    return {
        "plan": str(output),
        "moe_layers": plan.num_layers,
        "experts": plan.num_experts,
        "slots": plan.num_slots,
        "ranks": plan.num_ranks,
        "nodes": plan.topology.num_nodes,
        "imbalance_mean": float(busiest.mean()),
        "imbalance_max": float(busiest.max()),
    }


def plan_of_loads(
    load: np.ndarray, topology: Topology, redundant_experts: int, name: str
) -> tuple[Plan, np.ndarray]:
    """The plan for loads [hidden layers, experts], and the busiest rank's load over the mean [L].

    A layer without load counts as one without experts. Replicas of an expert share its load equally. Raises
    InputError if no layer has a load.
    """
    moe_layers = np.flatnonzero(load.any(axis=1))
    if not len(moe_layers):
        raise InputError("the loads are all zero; record while the engine serves")
    if redundant_experts < 0:
        raise InputError(f"redundant experts are {redundant_experts}; choose a number from 0 up")
    routed, ranks = load[moe_layers], topology.num_ranks
    num_slots = -(-(load.shape[1] + redundant_experts) // ranks) * ranks
    slots = load_only(routed, ranks, topology.num_nodes, num_slots)
    plan = Plan(
        model=name,
        num_hidden_layers=len(load),
        moe_layer_ids=tuple(moe_layers.tolist()),
        num_experts=load.shape[1],
        topology=topology,
        physical_to_logical_map=slots,
        next_owner=None,
        strategy=Strategy.DISPATCH_COMBINE,
        method="load-only",
    )
    replicas = np.stack([np.bincount(row, minlength=load.shape[1]) for row in slots])
    share = np.take_along_axis(routed / replicas, slots, axis=1).reshape(len(slots), ranks, -1).sum(axis=2)
    return plan, share.max(axis=1) / share.mean(axis=1)
