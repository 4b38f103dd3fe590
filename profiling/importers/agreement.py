"""Agreement of several files of one recording."""

from pathlib import Path
from typing import TypeVar

from exflow.errors import InputError

Value = TypeVar("Value")


def agreed(name: str, values: dict[Path, Value | None]) -> Value | None:
    """The value that the files state; None if no file states one. InputError where two disagree."""
    said = {value: path for path, value in values.items() if value is not None}
    if len(said) > 1:
        claims = ", ".join(f"{value} in {path}" for value, path in said.items())
        raise InputError(f"{name}: the files disagree ({claims}); import models one by one")
    return next(iter(said), None)
