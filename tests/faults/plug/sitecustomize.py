"""A fault at a named moment: every Python of a job that finds this on its path arms it as it starts.

EXFLOW_FAULT is JSON: before the `call`-th call of `at` ("module:function" or "module:Class.method"), in the
process of rank `rank`, `do` happens (see act); for the next `times` - 1 calls, too. The product knows nothing
of it.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

FAULT: dict[str, Any] = json.loads(os.environ.get("EXFLOW_FAULT", "null")) or {}


def act() -> None:
    if FAULT["do"] == "sleep 1 s":
        time.sleep(1)
    elif FAULT["do"] == "out of memory":
        import torch

        torch.empty(1 << 60, dtype=torch.uint8)
    else:
        os.kill(os.getpid(), signal.Signals[FAULT["do"]])


def arm(module: ModuleType) -> None:
    """Put the fault before the function."""
    *owners, name = FAULT["at"].partition(":")[2].split(".")
    owner: Any = module
    for each in owners:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if 0 <= calls - FAULT["call"] < FAULT["times"]:
            act()
        return function(*arguments, **options)

    setattr(owner, name, faulty)


class AfterImport(MetaPathFinder):
    """Arms the module as soon as it is loaded, before anybody takes a name from it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != FAULT["at"].partition(":")[0]:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_arm(module: ModuleType) -> None:
            load(module)
            arm(module)

        spec.loader.exec_module = load_and_arm  # type: ignore[method-assign]
        return spec


if FAULT and os.environ.get("RANK") == str(FAULT["rank"]):
    sys.meta_path.insert(0, AfterImport())
