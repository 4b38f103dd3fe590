"""Checks of a trace's arrays, whether they come from a caller or from a file."""

from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.shard import Rows

_MAX_INT32 = np.iinfo(np.int32).max
_EXPONENT = 0x7C00  # of a float16: all ones in NaN and infinity, and in nothing else
_CHUNK_TOKENS = 1 << 14  # rows looked at together, so that a mapped array is not copied into memory


def checked_integers(
    name: str, values: npt.ArrayLike, dtype: npt.DTypeLike, shape: tuple[int, ...], stop: int = _MAX_INT32 + 1
) -> npt.NDArray[Any]:
    """`values` as an array of `dtype`; InputError unless they are integers in 0..stop-1 of this shape."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name}: dtype is {array.dtype}; give integers")
    _check_shape(name, array, shape)
    _check_range(name, array, stop)
    return array.astype(dtype, copy=False)


def checked_weights(values: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """Gate weights as float16; InputError unless they are finite floating-point numbers of this shape."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        raise InputError(f"weights: dtype is {array.dtype}; give floating-point numbers")
    _check_shape("weights", array, shape)
    with np.errstate(over="ignore"):  # what is too large for it becomes infinite, and is refused
        halves = array.astype(np.float16, copy=False)
    check_weights("weights", halves)
    return halves


def check_weights(name: str, weights: npt.NDArray[np.float16]) -> None:
    """InputError, beginning with `name`, if a gate weight [tokens, layers, top_k] is NaN or infinite."""
    bits = weights.view(weights.dtype.str.replace("f", "u"))  # of its own byte order
    for start in range(0, len(bits), _CHUNK_TOKENS):
        wrong = (bits[start : start + _CHUNK_TOKENS] & _EXPONENT) == _EXPONENT
        if wrong.any():
            row, layer, choice = np.argwhere(wrong)[0].tolist()
            row += start
            raise InputError(
                f"{name}: row {row} holds {weights[row, layer, choice]} in MoE layer {layer}; gate weights "
                "are finite (within float16): correct it, or leave the weights out"
            )


def check_ids(name: str, experts: npt.NDArray[Any], layout: RoutingLayout) -> None:
    """InputError, beginning with `name`, if an id [tokens, layers, top_k] is not below its layer's number."""
    _check_range(name, experts, layout.num_experts)
    if layout.experts_per_layer is None or not experts.size:
        return
    highest = experts.max(axis=0).max(axis=1)  # in this order numpy goes through the memory as it lies
    for layer, (high, count) in enumerate(zip(highest.tolist(), layout.experts_per_layer, strict=True)):
        if high >= count:
            raise InputError(
                f"{name}: holds {high} in MoE layer {layer}; values there must be from 0 to {count - 1}"
            )


def check_values(where: str, rows: Rows, layout: RoutingLayout) -> None:
    """InputError, beginning with `where`, if a value of correctly typed rows is out of range.

    Reads a memory-mapped array at most twice and allocates nothing of its size.
    """
    if "weights" in rows:
        check_weights(f"{where}: weights", rows["weights"])
    check_ids(f"{where}: experts", rows["experts"], layout)
    for name, stop in (("sequence", _MAX_INT32 + 1), ("position", _MAX_INT32 + 1), ("phase", 2)):
        _check_range(f"{where}: {name}", rows[name], stop)


def disordered_sequence(sequence: npt.NDArray[np.int32], position: npt.NDArray[np.int32]) -> int | None:
    """The first sequence whose positions decrease somewhere, or None if all rows are in order."""
    order = np.argsort(sequence, kind="stable")
    by_sequence, positions = sequence[order], position[order]
    backwards = (by_sequence[1:] == by_sequence[:-1]) & (positions[1:] < positions[:-1])
    return int(by_sequence[np.argmax(backwards)]) if backwards.any() else None


def check_order(where: str, sequence: npt.NDArray[np.int32], position: npt.NDArray[np.int32]) -> None:
    """InputError, beginning with `where`, unless positions never decrease within a sequence."""
    wrong = disordered_sequence(sequence, position)
    if wrong is not None:
        raise InputError(f"{where}: the rows of sequence {wrong} are not in order of position; sort them")


def count_up(sequence: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """0, 1, 2, ... within each sequence: [5, 5, 7, 5, 7] -> [0, 1, 0, 2, 1]."""
    order = np.argsort(sequence, kind="stable")
    _, first, count = np.unique(sequence[order], return_index=True, return_counts=True)
    position = np.empty(len(sequence), np.int32)
    position[order] = np.arange(len(sequence)) - np.repeat(first, count)
    return position


def _check_shape(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{name}: shape is {array.shape}; {shape} is needed to match experts")


def _check_range(name: str, array: npt.NDArray[Any], stop: int) -> None:
    if not array.size:
        return
    low = 0 if array.dtype.kind == "u" else int(array.min())
    high = int(array.max())
    if low < 0 or high >= stop:
        raise InputError(f"{name}: holds {low if low < 0 else high}; values must be from 0 to {stop - 1}")
