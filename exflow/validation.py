"""Checks the content of a file against a pydantic model or a dataclass, and names the first fault in one
line."""

import reprlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from exflow.errors import InputError

Model = TypeVar("Model")
_UNKNOWN = (
    "extra_forbidden",
    "unexpected_keyword_argument",
)  # a misspelt key comes before a missing one


def validated(kind: type[Model], value: Any, source: Path, remedy: str = "") -> Model:
    """Build a model of `kind`, a pydantic model or a dataclass, from the content of the file `source`.

    Raises InputError, one line that names the file, the key, its value and the remedy: `remedy`, unless
    the fault itself has one.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{source}: {first_fault(kind, error, remedy)}") from error


def first_fault(kind: type[Any], error: ValidationError, remedy: str = "") -> str:
    """The first fault of `error`, as `edges[2].latency_us = -1: Input should be greater than 0; REMEDY`."""
    faults = error.errors()
    fault = next((each for each in faults if each["type"] in _UNKNOWN), faults[0])
    found = reprlib.repr(fault["input"])
    then = f"; {remedy}" if remedy else ""
    if not fault["loc"] and fault["type"] in ("model_type", "dataclass_type"):
        return f"holds {found}, not the keys {', '.join(_annotations(kind))}; write them"
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    if fault["type"] in _UNKNOWN:
        known = ", ".join(_annotations(_model_at(kind, fault["loc"][:-1])))
        return f"unknown key {key!r}; {remedy or f'remove it (known: {known})'}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"the key {key!r} is missing; {remedy or 'add it'}"
    reason = " ".join(fault["msg"].removeprefix("Value error, ").split())
    if fault["type"] == "value_error":  # our own checks name the keys, their values and the remedy
        return f"{key}: {reason}" if key else reason
    return f"{key} = {found}: {reason}{then}"


def _annotations(kind: type[Any]) -> dict[str, Any]:
    """The keys of a model, with their types."""
    if is_dataclass(kind):
        return {each.name: each.type for each in fields(kind)}
    return {name: field.annotation for name, field in kind.model_fields.items()}


def _model_at(kind: type[Any], place: tuple[int | str, ...]) -> type[Any]:
    """The model of the part of a document that is at `place`."""
    for part in place:
        if isinstance(part, str) and part in (known := _annotations(kind)):
            kind = next(_models_in(known[part]), kind)
    return kind


def _models_in(annotation: Any) -> Iterator[type[Any]]:
    """The models in an annotation such as `list[Edge] | None`."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
