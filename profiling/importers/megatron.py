"""Megatron-Core's router trace: router_trace_rank*.jsonl of --moe-routing-trace-path.

megatron/core/transformer/moe/router_trace.py: one object for each call of a layer's router,

    {"step", "stage", "block": "decoder" | "mtp", "layer", "rank", "num_tokens", "topk", "top_indices"}

`layer` counts from 0. In training a step may hold several micro-batches, each of which calls every layer.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording
from exflow.profiling.importers.json_values import json_values, shown
from exflow.profiling.importers.left_out import LeftOut
from exflow.profiling.importers.passes import RowSequences, SeenPasses

_REMEDY = "give the router_trace_rank*.jsonl that Megatron-Core wrote"
_Layers = dict[int, list[IntArray]]  # layer -> the ids of each of its calls in a step


@dataclass(frozen=True)
class _Step:
    """The calls that a file holds of a step; it may begin or end within its first and its last."""

    number: int
    layers: _Layers
    num_bytes: int
    is_first: bool
    is_last: bool


def open_megatron(paths: Sequence[Path], hints: Hints) -> Recording:
    """The ranks' files of one recording; tokens that several ranks recorded count once.

    Multi-token-prediction layers are left out: they are no layers of the model. So are calls of a step where
    a file was cut, for which some layers have no record. The files know no requests: see RowSequences. Raises
    InputError for a record that is damaged, and where the layers of another step have different numbers of
    calls or tokens.
    """
    expected = _layers(paths, hints)
    return Recording(lambda left: _rows(paths, hints, expected, left))


def _rows(
    paths: Sequence[Path], hints: Hints, expected: frozenset[int], left: LeftOut
) -> Iterator[ForeignRows]:
    seen, sequences = SeenPasses(len(paths)), RowSequences()
    for path in paths:
        for step in _steps(path, hints.moe_layers, left):
            layers = _whole_calls(path, step, expected, left)
            for call, experts in enumerate(_calls(path, step.number, layers)):
                if seen.is_repeated((step.number, call), experts):
                    continue
                yield sequences.rows(path, layers, experts, step.num_bytes if call == 0 else 0)


def _layers(paths: Sequence[Path], hints: Hints) -> frozenset[int]:
    """All layers of the recording: one of a file's first two steps is whole, or another file has more."""
    beginnings = (itertools.islice(_steps(path, hints.moe_layers, LeftOut()), 2) for path in paths)
    return frozenset(layer for steps in beginnings for step in steps for layer in step.layers)


def _steps(path: Path, kept: tuple[int, ...] | None, left: LeftOut) -> Iterator[_Step]:
    """The steps of a file, which writes one after the other."""
    step, size, is_first = -1, 0, True
    layers: _Layers = {}
    for place, record, num_bytes in json_values(path, left):
        where = f"{path}: {place}"
        number, layer = _integer(where, record, "step"), _integer(where, record, "layer")
        if number != step and layers:
            yield _Step(step, layers, size, is_first, is_last=False)
            layers, size, is_first = {}, 0, False
        step, size = number, size + num_bytes
        if record.get("block") == "decoder" and (kept is None or layer in kept):
            layers.setdefault(layer, []).append(_ids(where, record))
    if layers:
        yield _Step(step, layers, size, is_first, is_last=True)


def _whole_calls(path: Path, step: _Step, expected: frozenset[int], left: LeftOut) -> _Layers:
    """The calls that all layers have; fewer than there are only where the file was cut."""
    counts = [len(step.layers.get(layer, [])) for layer in sorted(expected)]
    whole = min(counts)
    if whole == max(counts):
        return step.layers
    if not (step.is_first or step.is_last):
        lacking = sorted(expected)[counts.index(whole)]
        raise InputError(
            f"{path}: step {step.number} has {whole} calls of layer {lacking}, of other layers up to "
            f"{max(counts)}; record it again, or give moe_layers without it"
        )
    where = f"{path}: step {step.number}"
    left.add("calls of routers in a step that was cut off", where, sum(counts) - whole * len(counts))
    if not whole:
        return {}
    return {
        layer: calls[:whole] if step.is_last else calls[len(calls) - whole :]
        for layer, calls in step.layers.items()
    }


def _calls(path: Path, step: int, layers: _Layers) -> Iterator[IntArray]:
    """[tokens, layers, top_k] of each call of all layers."""
    if not layers:
        return
    first = min(layers)
    for layer, calls in layers.items():
        if [ids.shape for ids in calls] != [ids.shape for ids in layers[first]]:
            raise InputError(
                f"{path}: step {step} has ids {[ids.shape for ids in calls][:3]} in layer {layer} and "
                f"{[ids.shape for ids in layers[first]][:3]} in layer {first}, one call each; give the file "
                "whole, or cut it after a step"
            )
    for call in range(len(layers[first])):
        yield np.stack([layers[layer][call] for layer in sorted(layers)], axis=1)


def _ids(where: str, record: dict[str, Any]) -> IntArray:
    """[num_tokens, topk] int32 of one record."""
    tokens, top_k = _integer(where, record, "num_tokens"), _integer(where, record, "topk")
    value = record.get("top_indices")
    try:
        ids = np.array(value if value else np.empty((0, top_k), np.int64))
    except ValueError:  # rows of different lengths
        ids = np.empty(0)
    if ids.shape != (tokens, top_k) or ids.dtype.kind != "i":
        raise InputError(
            f"{where}: top_indices: is {shown(value)}; {tokens} rows of {top_k} ids are needed to match "
            f"num_tokens and topk; {_REMEDY}"
        )
    if ids.size and ids.max() >= 1 << 31:
        raise InputError(f"{where}: top_indices: holds {ids.max()}, which is no expert; {_REMEDY}")
    return ids.astype(np.int32)


def _integer(where: str, record: Any, name: str) -> int:
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise InputError(f"{where}: {name}: is {shown(value)}, not a number from 0 up; {_REMEDY}")
    return value
