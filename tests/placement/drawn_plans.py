"""Plans of given slots."""

from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology


def plan_of_slots(slots: npt.ArrayLike, topology: Topology, **changes: Any) -> Plan:
    """A plan without a preference among owners, for a model of MoE layers only, but for the `changes`."""
    physical_to_logical_map = np.asarray(slots)
    num_layers = len(physical_to_logical_map)
    known: dict[str, Any] = {
        "model": "",
        "num_hidden_layers": num_layers,
        "moe_layer_ids": tuple(range(num_layers)),
        "num_experts": int(physical_to_logical_map.max()) + 1,
        "next_owner": None,
        "method": "test",
    }
    return Plan(topology=topology, physical_to_logical_map=physical_to_logical_map, **(known | changes))


def make_plan(rank_of_expert: np.ndarray, topology: Topology, **changes: Any) -> Plan:
    """Make a plan in which each expert has one replica, on this rank."""
    return plan_of_slots(np.argsort(rank_of_expert, axis=1, kind="stable"), topology, **changes)
