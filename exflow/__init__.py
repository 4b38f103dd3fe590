"""ExFlow: expert placement by inter-layer affinity, and decoding with one all-to-all a layer.

Nothing heavy is imported here: the offline placer starts without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exflow.errors import InputError as InputError
    from exflow.placement.plan.plan import Plan as Plan
    from exflow.profiling.record import record as record
    from exflow.profiling.trace import RoutingTrace as RoutingTrace
    from exflow.runtime.deploy import load_model as load_model

__version__ = "0.1.0"
__all__ = ["InputError", "Plan", "RoutingTrace", "load_model", "record"]

_HOME = {
    "InputError": "exflow.errors",
    "load_model": "exflow.runtime.deploy",
    "Plan": "exflow.placement.plan.plan",
    "RoutingTrace": "exflow.profiling.trace",
    "record": "exflow.profiling.record",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'exflow' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
