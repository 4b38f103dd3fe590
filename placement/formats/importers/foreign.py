"""A placement as read from another engine's file, and the checks that all readers share.

Readers are given a file's bytes and raise InputErrors that do not name the file; the registry adds its name.
"""

import json
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.encodings import utf8_text
from exflow.errors import InputError
from exflow.placement.formats.exporters.sidecar import ModelShape

MAX_EXPERTS = 1 << 16  # ids of a plan are stored in 16 bits at most


@dataclass(frozen=True, eq=False)
class ForeignMap:
    """slots [L, P] int64: the expert in each slot of each MoE layer; ranks, where the file says them."""

    slots: npt.NDArray[np.int64]
    num_ranks: int | None = None


def parsed_json(content: bytes) -> Any:
    """The JSON value; InputError for what is none, for a key given twice, and for a pickle in disguise."""
    try:
        return json.loads(decoded(content), object_pairs_hook=_each_key_once)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"is not valid JSON ({error}); give the file whole") from error
    except RecursionError as error:
        raise InputError(
            "is JSON nested too deeply for a placement; give the file that the engine reads"
        ) from error


def decoded(content: bytes) -> str:
    """The text; what torch.save or pickle wrote is refused, never loaded."""
    if content.startswith((b"\x80", b"PK\x03\x04")):
        raise InputError("is a pickle or a .pt archive, which is never loaded; save the map as text")
    try:
        return utf8_text(content)
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 text (byte {error.start} is {content[error.start]:#04x}); give the engine's file"
        ) from error
    except ValueError as error:
        raise InputError(f"is not UTF-8 text: {error}") from error


def fields(name: str, value: Any, keys: tuple[str, ...]) -> list[Any]:
    """The values of `keys` of an object that has these keys and no others."""
    if not isinstance(value, dict):
        raise InputError(f"{name}: is {reprlib.repr(value)}; give an object with the keys {', '.join(keys)}")
    for key in keys:
        if key not in value:
            raise InputError(f"{name}: has no key {key!r}; add it")
    for key in value:
        if key not in keys:
            raise InputError(f"{name}: unknown key {reprlib.repr(key)}; keep {', '.join(keys)} alone")
    return [value[key] for key in keys]


def items(name: str, value: Any, length: int, of_what: str) -> list[Any]:
    """A list of `length` entries."""
    if not isinstance(value, list):
        raise InputError(f"{name}: is {reprlib.repr(value)}; give a list")
    if len(value) != length:
        raise InputError(f"{name}: has {len(value)} entries instead of {length}; give one for each {of_what}")
    return value


def number(name: str, value: Any, expected: int, why: str) -> None:
    """Raise InputError unless `value` is the `expected` number."""
    if type(value) is not int or value != expected:
        raise InputError(f"{name}: is {reprlib.repr(value)} instead of {expected}, {why}")


def expert_ids(name: str, value: Any, length: int | None = None) -> list[int]:
    """A row of ids; `length` is what the rows before it have."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}: is {reprlib.repr(value)}; give the list of the experts in the slots")
    if length is not None and len(value) != length:
        raise InputError(f"{name}: has {len(value)} slots, others {length}; give all the same number")
    for index, expert in enumerate(value):
        if type(expert) is not int or not 0 <= expert < MAX_EXPERTS:
            raise InputError(
                f"{name}[{index}]: is {reprlib.repr(expert)}; give the id of an expert, from 0 up"
            )
    return value


def table(rows: dict[str, Any]) -> npt.NDArray[np.int64]:
    """[rows, P]: lists of ids, each under the name that an error shall have."""
    checked: list[list[int]] = []
    for name, row in rows.items():
        checked.append(expert_ids(name, row, len(checked[0]) if checked else None))
    return np.array(checked, dtype=np.int64)


def check_every_expert_placed(slots: npt.NDArray[np.int64], model: ModelShape) -> None:
    """Raise InputError unless each MoE layer's row of `slots` [L, P] holds all its experts and no others."""
    for layer, row, count in zip(model.moe_layer_ids, slots, model.experts_per_layer, strict=True):
        if row.max() >= count:
            raise InputError(
                f"hidden layer {layer}: holds expert {row.max()}, the model has {count} there; place "
                f"0..{count - 1}"
            )
        missing = np.setdiff1d(np.arange(count), row)
        if len(missing):
            raise InputError(
                f"hidden layer {layer}: does not hold expert {missing[0]}; place each of 0..{count - 1}"
            )


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InputError(f"the key {reprlib.repr(key)} is given twice; keep one")
            seen.add(key)
    return result
