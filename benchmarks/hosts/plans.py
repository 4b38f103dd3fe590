"""Placements that are compared on several hosts."""

from exflow.cost.auto import step_traffic
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.profiling.trace import RoutingTrace

# how each is made, and for how many slots there is a spare one, which holds a replica
PLACEMENTS = {"contiguous": ("contiguous", 0), "affinity": ("auto", 0), "replicas": ("auto", 8)}
PLACE_SECONDS = 20.0


def plans_of(trace: RoutingTrace, count: int) -> dict[str, Plan]:
    """Plans by name of the placement. All ranks wait for the rank that serves most and for the one that owns
    most, so a unit of imbalance is priced as all messages."""
    topology = Topology(num_nodes=count, gpus_per_node=1)
    baseline = step_traffic(place(trace, topology, solving=Solving("contiguous")), trace, count)
    messages = sum(baseline.dispatch + baseline.combine)
    objective = Objective(balance_price=messages, owner_price=messages)
    return {
        name: place(
            trace,
            topology,
            objective=objective,
            solving=Solving(method, time_limit=PLACE_SECONDS),
            redundant_experts=trace.num_experts // each if each else 0,
        )
        for name, (method, each) in PLACEMENTS.items()
    }
