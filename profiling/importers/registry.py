"""The foreign trace formats by name, and reading one or several files of them as one trace."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.foreign import ForeignTrace
from exflow.profiling.importers.npy import read_npy
from exflow.profiling.importers.npz import read_npz
from exflow.profiling.trace import RoutingTrace

_log = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class ForeignFormat:
    """A format that can be imported: the bytes its files begin with, and its reader."""

    magic: bytes
    read: Callable[[Path], ForeignTrace]


FORMATS = {
    "npz": ForeignFormat(b"PK\x03\x04", read_npz),
    "npy": ForeignFormat(b"\x93NUMPY", read_npy),
}


def read_trace(
    paths: Sequence[str | Path], format: str | None = None, num_experts: int | None = None
) -> RoutingTrace:
    """The routing in `paths`, files of one model, joined in this order into one trace in memory.

    `format` is a name of FORMATS; without it each file's first bytes decide. The number of experts is
    `num_experts`, else what the files say, else the largest id plus 1 (with a logged warning); the
    `experts_per_layer` of one file holds for those that do not say it. Sequences of the files stay apart:
    they are numbered 0, 1, ... over all files, so that their homes spread over ranks. Gate weights are kept
    if every file has them. Raises InputError naming the file that does not fit.
    """
    if not paths:
        raise InputError("import: no files given; name at least one")
    parts = [_format_of(Path(path), format).read(Path(path)) for path in paths]
    if num_experts is None:
        num_experts = _num_experts(parts)
    counts = _agreed("experts_per_layer", {part.path: part.experts_per_layer for part in parts})
    return _join([(part.path, part.trace(num_experts, counts)) for part in parts])


def _format_of(path: Path, name: str | None) -> ForeignFormat:
    known = ", ".join(FORMATS)
    if name is not None and name not in FORMATS:
        raise InputError(f"format: {name} is not known; choose one of {known}")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file to import") from error
    if name is not None:
        return FORMATS[name]
    for candidate in FORMATS.values():
        if start.startswith(candidate.magic):
            return candidate
    raise InputError(f"{path}: is in no format known here ({known}); convert it to one of them")


def _num_experts(parts: list[ForeignTrace]) -> int:
    """The number of experts that the files agree on, or the smallest that fits all their ids."""
    said = _agreed("num_experts", {part.path: part.num_experts for part in parts})
    if said is not None:
        return said
    largest = max(int(part.experts.max()) for part in parts)
    _log.warning("the files do not say num_experts: taken as %d, the largest id plus 1", largest + 1)
    return largest + 1


def _agreed(name: str, values: dict[Path, Value | None]) -> Value | None:
    """What every file that is not silent says; InputError where they disagree."""
    said = {value: path for path, value in values.items() if value is not None}
    if len(said) > 1:
        claims = ", ".join(f"{value} in {path}" for value, path in said.items())
        raise InputError(f"{name}: the files disagree ({claims}); import models one by one")
    return next(iter(said), None)


def _join(parts: list[tuple[Path, RoutingTrace]]) -> RoutingTrace:
    first_path, first = parts[0]
    sequences, num_sequences = [], 0
    for path, trace in parts:
        if trace.layout != first.layout:
            raise InputError(
                f"{path}: has {trace.num_layers} layers and top {trace.top_k}, {first_path} has "
                f"{first.num_layers} and {first.top_k}; join files of one model"
            )
        sequences.append(trace.sequence + np.int32(num_sequences))
        num_sequences += int(trace.sequence.max()) + 1
    traces = [trace for _, trace in parts]
    weights = [trace.weights for trace in traces if trace.weights is not None]
    return RoutingTrace.from_arrays(
        np.concatenate([trace.experts for trace in traces]),
        num_experts=first.num_experts,
        sequence=np.concatenate(sequences),
        position=np.concatenate([trace.position for trace in traces]),
        weights=np.concatenate(weights) if len(weights) == len(traces) else None,
        experts_per_layer=first.experts_per_layer,
    )
