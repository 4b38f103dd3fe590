"""Dependencies: lower bounds are the tested versions, licences are listed, nothing uses the network.

`python tests/test_supply_chain.py > docs/licences.md` writes the list anew.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEEDED = {
    "ExFlow": PYPROJECT["project"]["dependencies"],
    "transformers models": PYPROJECT["project"]["optional-dependencies"]["transformers"],
    "development": PYPROJECT["project"]["optional-dependencies"]["dev"],
}
LICENCES = ROOT / "docs" / "licences.md"


def bounds(requirements: list[str]) -> dict[str, str]:
    """The lower bound of each requirement that has one."""
    parsed = [Requirement(each) for each in requirements]
    return {
        canonicalize_name(each.name): bound.version
        for each in parsed
        for bound in each.specifier
        if bound.operator == ">="
    }


def test_the_oldest_versions_tested_are_the_lower_bounds() -> None:
    """`make test-oldest` installs these; every dependency has one, and none has an upper bound."""
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    needed = NEEDED["ExFlow"]
    assert bounds(needed).keys() == {canonicalize_name(Requirement(each).name) for each in needed}
    test_tools = [each for each in NEEDED["development"] if Requirement(each).name in pinned]
    assert pinned == bounds([*needed, *test_tools])
    assert all(spec.operator == ">=" for each in needed for spec in Requirement(each).specifier)


def closure(requirements: list[str]) -> Iterator[str]:
    """The names of what is installed for these requirements, and for what they require."""
    left, seen = [(Requirement(each), "") for each in requirements], set()
    while left:
        each, extra = left.pop()
        name = canonicalize_name(each.name)
        if each.marker and not each.marker.evaluate({"extra": extra}):
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # an option that nobody installed
        if (name, frozenset(each.extras)) not in seen:
            seen.add((name, frozenset(each.extras)))
            yield name
            left += [(Requirement(other), extra) for other in requires for extra in ("", *each.extras)]


def licence(name: str) -> str:
    """Return the package's licence: its expression, classifier, or the first line of the field."""
    metadata = distribution(name).metadata
    said = [metadata["License-Expression"]]
    classifiers = [
        each.split(" :: ")[-1] for each in metadata.get_all("Classifier", []) if "License ::" in each
    ]
    said += [", ".join(classifiers), metadata["License"] or ""]
    return next((text.splitlines()[0] for text in said if text), "not said")


def listed() -> dict[str, str]:
    """List the installed packages, each under the first one that needs it."""
    found: dict[str, str] = {}
    for who, requirements in NEEDED.items():
        for name in sorted(closure(requirements)):
            found.setdefault(name, who)
    return found


def page() -> str:
    rows = "".join(f"| {name} | {licence(name)} | {who} |\n" for name, who in listed().items())
    return f"""# Licences

ExFlow is under Apache-2.0. It needs what is listed here, directly or through others; nothing of it is copied
into this repository or into the wheel. Names and licences are as the packages themselves say, in the set-up
of `constraints.txt` (a CPU build of torch; a CUDA build brings NVIDIA's libraries, under NVIDIA's terms).
`python tests/test_supply_chain.py > docs/licences.md` writes this page, and a test compares it with what is
installed.

| package | licence | needed by |
|---|---|---|
{rows}"""


@pytest.mark.all
def test_the_licences_of_what_is_installed_are_listed() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {canonicalize_name(name): version for name, version in re.findall(r"(\S+)==(\S+)", text)}
    pinned["torch"] += "+cpu"
    installed = {name: distribution(name).version for name in listed()}
    if installed != installed | {name: pinned[name] for name in pinned.keys() & installed.keys()}:
        pytest.skip("the list is that of the pinned set-up, with its CPU build of torch")
    rows = re.findall(r"^\| (\S+) \| (.*) \| (.*) \|$", LICENCES.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: who for name, _, who in rows if name != "package"} == listed()
    assert not [name for name, said, _ in rows if said == "not said"]
    assert not [name for name, said, _ in rows if re.search(r"\b(A?GPL|SSPL|BUSL)", said)]


def test_the_tests_reach_no_network() -> None:
    for address in (("192.0.2.1", 9), ("nonesuch.invalid", 9)):
        with pytest.raises(OSError, match="no network here"):
            socket.create_connection(address, timeout=0.1)


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.distributed
def test_no_verb_uses_the_network(tmp_path: Path) -> None:
    """Every process, ranks included, forbids itself to look up or reach any host but this one."""
    (tmp_path / "watch").mkdir()
    shutil.copy(Path(__file__).with_name("no_network.py"), tmp_path / "watch" / "sitecustomize.py")
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 40)
    model, reached = ROOT / "models" / "gpt-moe-demo", tmp_path / "reached"
    lines = [
        f"profile {model} --text text.txt --length 64 -o trace",
        "place trace --gpus 2 --time-limit 1 -o plan.json",
        "evaluate plan.json trace",
        "report trace plan.json -o report.html",
        "export plan.json --format sglang -o map.json",
        "doctor --json",
        f"generate {model} --prompt Rain --max-new-tokens 4 --nproc 2 --plan plan.json",
        "probe",
    ]
    code = f"""
import json, socket, sys
from exflow import cli
for line in {json.dumps(lines)}:
    if line == "probe":  # the watch works
        try:
            socket.create_connection(("192.0.2.1", 9), timeout=0.1)
        except OSError as error:
            assert str(error) == "no network here"
            continue
        raise AssertionError("the watch lets pass")
    sys.argv = ["exflow", *line.split()]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, line
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "watch"), "REACHED": str(reached)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    hosts = reached.read_text().splitlines()
    assert len(hosts) == 1 and "192.0.2.1" in hosts[0], hosts


if __name__ == "__main__":
    print(page(), end="")
