"""Checks what a file holds against a pydantic model, and tells the first fault in one line."""

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from exflow.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], value: Any, source: Path, remedy: str = "") -> Model:
    """Build a model of `kind` from what the file `source` holds.

    Raises InputError, one line that names the file, the key, its value and the remedy: `remedy`, unless
    the fault says one itself.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{source}: {first_fault(kind, error, remedy)}") from error


def first_fault(kind: type[BaseModel], error: ValidationError, remedy: str = "") -> str:
    """The first fault of `error`: `edges[2].latency_us = -1: Input should be greater than 0; REMEDY`."""
    fault = error.errors()[0]
    found = reprlib.repr(fault["input"])
    then = f"; {remedy}" if remedy else ""
    if not fault["loc"] and fault["type"] == "model_type":
        return f"holds {found}, not the keys {', '.join(kind.model_fields)}; write them"
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_model_at(kind, fault["loc"][:-1]).model_fields)
        return f"unknown key {key!r}; {remedy or f'remove it (known: {known})'}"
    if fault["type"] == "missing":
        return f"the key {key!r} is missing; {remedy or 'add it'}"
    reason = " ".join(fault["msg"].removeprefix("Value error, ").split())
    if fault["type"] == "value_error":  # one of our own, which names the keys, their values and the remedy
        return f"{key}: {reason}" if key else reason
    return f"{key} = {found}: {reason}{then}"


def _model_at(kind: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The model of the part of a document that is at `place`."""
    for part in place:
        if isinstance(part, str) and part in kind.model_fields:
            kind = next(_models_in(kind.model_fields[part].annotation), kind)
    return kind


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation such as `list[Edge] | None` is about."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
