"""Layers of imports, the cost of a bare import, and the content of the wheel."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PARTS = ("exflow", "kernels", "placement", "profiling")
# From the lowest floor up: a part imports parts of lower floors alone, typing included; parts of a floor
# do not import one another. The parts of placement are its packages, and the modules beside them.
FLOORS = (
    ("errors", "encodings", "console"),
    ("files", "texts", "validation"),
    ("job", "kernels", "profiling"),
    ("comm",),
    ("model", "placement.compiled"),
    ("placement.counts",),
    ("placement.plan",),
    ("placement.time",),
    ("placement.solve",),
    ("placement.traffic",),
    ("placement.make_plan", "placement.formats"),
    ("placement.pareto", "placement.robust", "placement.learning_curve", "placement.fastest_plan"),
    ("placement.eplb",),
    ("runtime", "cost", "train"),
    ("bench", "report"),
    ("commands",),
    ("cli",),
)
FRONT = ("exflow", "exflow.placement")  # which name what is public, and import it when it is asked for


def module_files() -> dict[str, Path]:
    """Module name -> file. The folders at the top are symlinked into exflow/, and imported from there."""
    found = {}
    for part in PARTS:
        for path in (REPO / part).rglob("*.py"):
            names = path.relative_to(REPO).with_suffix("").parts
            names = names if part == "exflow" else ("exflow", *names)
            if part != "exflow" or names[1] not in PARTS:
                found[".".join(names).removesuffix(".__init__")] = path
    return found


FILES = module_files()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the imports of a file, and whether each is for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            for alias in node.names:  # "from exflow.profiling import trace" is an import of a module
                inner_module = f"{node.module}.{alias.name}"
                yield inner_module if inner_module in FILES else node.module, id(node) in typing_only


def modules_in(part: str) -> list[str]:
    found = [name for name in FILES if name.startswith(f"exflow.{part}.")]
    assert found, part
    return found


def part_of(module: str) -> str:
    names = module.split(".")[1:]
    return ".".join(names[:2]) if names[0] == "placement" else names[0]


def test_every_part_has_a_floor() -> None:
    parts = [part for floor in FLOORS for part in floor]
    assert len(parts) == len(set(parts))
    assert {part_of(module) for module in FILES if module not in FRONT} == set(parts)


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=[" ".join(floor) for floor in FLOORS])
def test_imports_go_down(floor: int) -> None:
    below = {part for lower in FLOORS[:floor] for part in lower}
    for module in FILES:
        part = "" if module in FRONT else part_of(module)
        if part in FLOORS[floor]:
            needed = {name for name, _ in imports(FILES[module]) if name.startswith("exflow.")}
            wrong = {name for name in needed if name in FRONT or part_of(name) not in below | {part}}
            assert not wrong, f"{module} imports {wrong}"


def test_placement_knows_no_torch() -> None:
    for module in modules_in("placement"):
        assert not {name for name, _ in imports(FILES[module]) if name.split(".")[0] == "torch"}, module


def test_every_import_of_ours_exists_and_none_goes_in_circles() -> None:
    """Within a part, too."""
    needs = {
        module: {name for name, _ in imports(FILES[module]) if name.split(".")[0] == "exflow"}
        for module in FILES
        if module not in FRONT
    }
    missing = {name for needed in needs.values() for name in needed} - FILES.keys()
    assert not missing
    list(TopologicalSorter({one: needed - set(FRONT) for one, needed in needs.items()}).static_order())


@pytest.mark.parametrize("package", FRONT)
def test_what_is_public_is_found_where_it_is_said_to_be(package: str) -> None:
    front = importlib.import_module(package)
    for name in front.__all__:
        assert getattr(front, name).__module__.startswith("exflow."), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        front.nothing  # noqa: B018


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_bare_import_loads_nothing_heavy() -> None:
    assert not loaded_by("import exflow") & {"torch", "numpy", "numba", "scipy", "pulp", "pydantic"}
    assert not loaded_by("import exflow.cli") & {"torch", "numba", "scipy", "pulp"}


def test_the_offline_placer_runs_without_torch() -> None:
    statement = f"import {', '.join(sorted(modules_in('placement')))}"
    assert "torch" not in loaded_by(statement)


@pytest.mark.all
@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in (*PARTS, "configs", "pyproject.toml", "README.md", "LICENSE"):
        if (REPO / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPO / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    for build in ("first", "second"):
        os.utime(source / "exflow" / "console.py")  # as in another checkout
        subprocess.run([*pip, "-w", str(tmp_path / build), str(source)], check=True, env=environment)
        shutil.rmtree(source / "build")
    wheel, again = (next((tmp_path / build).glob("exflow-*.whl")) for build in ("first", "second"))
    assert wheel.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        f"{module.replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        for module, path in FILES.items()
    }
    report = REPO / "exflow" / "report"  # its templates, style sheets and script
    data = [each for each in report.rglob("*") if each.suffix in (".j2", ".css", ".js")]
    configs = [*REPO.glob("configs/machines/*.yaml"), *REPO.glob("configs/shapes/*/config.json")]
    assert data and configs
    named = {str(each.relative_to(REPO)) for each in data}
    named |= {f"exflow/{each.relative_to(REPO)}" for each in configs}
    assert packed == modules | {"exflow/py.typed"} | named
