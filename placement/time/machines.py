"""Machines by the name of a file in configs/machines, or from a file of one's own."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from exflow.errors import InputError
from exflow.files import read_yaml
from exflow.placement.time.machine import Machine
from exflow.validation import validated

DEFAULT = "h200"
_REMEDY = "see docs/report.md"


@dataclass(frozen=True)
class NamedMachine:
    """A machine, and the name or path that it was asked for by."""

    name: str
    machine: Machine


def machine_named(name: str) -> NamedMachine:
    """The machine called `name` in configs/machines, or in the YAML file of this path.

    Raises InputError for an unknown name, and for a file that is no machine.
    """
    known = {path.stem: path for path in sorted(_folder().glob("*.yaml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise InputError(
            f"machine {name!r} is unknown; give one of {', '.join(known)}, or a YAML file ({_REMEDY})"
        )
    return NamedMachine(name, load_machine(path))


def load_machine(path: Path) -> Machine:
    """Read a YAML file with the fields of `Machine`; see docs/report.md."""
    return validated(Machine, read_yaml(path, "file of a machine", _REMEDY), path, _REMEDY)


def _folder() -> Path:
    return Path(str(files("exflow"))) / "configs" / "machines"
