"""Expert placement: makes a plan (which GPU each expert lives on) from routing traces, and evaluates it.

The names below are public; the modules that they lie in may move. Nothing is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exflow.placement.eplb import rebalance_experts as rebalance_experts
    from exflow.placement.fastest_plan import place_for_time as place_for_time
    from exflow.placement.formats.exporters.registry import export_plan as export_plan
    from exflow.placement.formats.importers.registry import read_plan as read_plan
    from exflow.placement.make_plan import InUse as InUse
    from exflow.placement.make_plan import Solving as Solving
    from exflow.placement.make_plan import place as place
    from exflow.placement.plan.plan import Plan as Plan
    from exflow.placement.plan.topology import Topology as Topology
    from exflow.placement.plan.topology_file import load_topology as load_topology
    from exflow.placement.solve.objective import Objective as Objective
    from exflow.placement.time.serving import Serving as Serving
    from exflow.placement.traffic.evaluate import evaluate as evaluate
    from exflow.placement.traffic.step_time import step_time as step_time

_HOME = {
    "InUse": "make_plan",
    "Objective": "solve.objective",
    "Plan": "plan.plan",
    "Serving": "time.serving",
    "Solving": "make_plan",
    "Topology": "plan.topology",
    "evaluate": "traffic.evaluate",
    "export_plan": "formats.exporters.registry",
    "load_topology": "plan.topology_file",
    "place": "make_plan",
    "place_for_time": "fastest_plan",
    "read_plan": "formats.importers.registry",
    "rebalance_experts": "eplb",
    "step_time": "traffic.step_time",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"exflow.placement.{_HOME[name]}"), name)
