"""Running pieces of the engines' own source (see test_engines.py for where it is looked for)."""

import ast
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def engine_file() -> Callable[[str], Path]:
    """A file of an engine's source, "sglang/srt/..."; skips the test if it is nowhere."""
    return _engine_file


@pytest.fixture
def run_engine_file(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run such a file as a module; keywords are the modules it imports, dots as __, and what they hold."""

    def run(name: str, **stubs: dict[str, Any]) -> Any:
        path = _engine_file(name)
        for dotted, content in stubs.items():
            parts = dotted.split("__")
            for end in range(1, len(parts) + 1):
                module = ModuleType(".".join(parts[:end]))
                module.__path__ = []
                if module.__name__ not in sys.modules or end == len(parts):
                    monkeypatch.setitem(sys.modules, module.__name__, module)
            vars(module).update(content)
        spec = importlib.util.spec_from_file_location(f"engine_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        return module

    return run


@pytest.fixture
def run_engine_definition() -> Callable[..., Any]:
    """Run one class or function of such a file, with keywords for the names it uses."""

    def run(file: str, name: str, **names: Any) -> Any:
        path = _engine_file(file)
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        found = [one for one in nodes if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == name]
        exec(compile(ast.Module(found, []), str(path), "exec"), names)
        return names[name]

    return run


def _engine_file(name: str) -> Path:
    package, _, inside = name.partition("/")
    folder = Path(os.environ.get("EXFLOW_ENGINES", ""), package)
    if not folder.is_dir() or "EXFLOW_ENGINES" not in os.environ:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"{package} is neither installed nor in the folder that EXFLOW_ENGINES names")
        folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / inside
    if not path.exists():
        pytest.skip(f"{path} is not there: another version of {package}?")
    return path
