"""Plain .npz: an array `experts`; optionally `seq`, `pos`, `weights`, `num_experts`, `experts_per_layer`."""

import itertools
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.importers.agreement import agreed
from exflow.profiling.importers.arrays import ArrayStream, rows_in_a_block
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording, parsing
from exflow.profiling.importers.left_out import WITHOUT_TOKENS, LeftOut
from exflow.profiling.trace import DECODE
from exflow.profiling.validate import checked_integers, count_up, disordered_sequence

_REMEDY = "give an .npz of plain numeric arrays (numpy.savez), with the ids under the name experts"
Numbers = npt.NDArray[np.int32]

_MOST_FACTS = 1 << 20  # bytes of an array of facts
_BOMB_BYTES, _BOMB_RATIO = 1 << 26, 200  # ids of a real router compress by 20 at most


def open_npz(paths: Sequence[Path], hints: Hints) -> Recording:
    """Arrays of other names are left alone; nothing is unpickled.

    Sequences are renumbered in ascending order of their ids. Without ids, a position that does not advance
    begins a new sequence. If positions run backwards within a sequence, all rows are sorted by sequence and
    position, rows of equal position keeping their order. Weights are kept if every file has them.

    Raises InputError for a damaged archive, an object array, an archive without `experts`, or one that holds
    far less than it declares.
    """
    counts, numbers, weighted = {}, {}, []
    for path in paths:
        with parsing(path, _REMEDY), zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if "experts" not in names:
                held = ", ".join(sorted(names))
                raise InputError(f"{path}: has no array experts (it holds {held}); {_REMEDY}")
            counts[path] = _counts(path, archive) if "experts_per_layer" in names else None
            numbers[path] = max(counts[path] or ()) if counts[path] else None
            if "num_experts" in names:
                numbers[path] = _number(path, archive)
            weighted.append("weights" in names)
    return Recording(
        lambda left: _rows(paths, all(weighted), left),
        num_experts=agreed("num_experts", numbers),
        experts_per_layer=agreed("experts_per_layer", counts),
        has_weights=all(weighted),
    )


def _rows(paths: Sequence[Path], with_weights: bool, left: LeftOut) -> Iterator[ForeignRows]:
    num_sequences = 0
    for path in paths:
        with parsing(path, _REMEDY), zipfile.ZipFile(path) as archive:
            experts = _member(archive, "experts")
            _check_experts(path, experts, archive)
            if not experts.shape[0]:
                left.add(WITHOUT_TOKENS, f"{path}: experts: shape is {experts.shape}")
                continue
            weights = _member(archive, "weights") if with_weights else None
            if weights is not None and weights.shape != experts.shape:
                raise InputError(
                    f"{path}: weights: shape is {weights.shape}, experts has {experts.shape}; "
                    "give a weight for each id"
                )
            sequence, position = _places(path, archive, experts.shape[0])
            yield from _in_order(path, experts, weights, sequence + np.int32(num_sequences), position)
            num_sequences += int(sequence.max()) + 1


def _in_order(
    path: Path, experts: ArrayStream, weights: ArrayStream | None, sequence: Numbers, position: Numbers
) -> Iterator[ForeignRows]:
    ids, gates = _blocks(experts), itertools.repeat(None) if weights is None else _blocks(weights)
    if disordered_sequence(sequence, position) is not None:
        order = np.lexsort((position, sequence))
        ids = iter([experts.whole()[order]])
        gates = itertools.repeat(None) if weights is None else iter([weights.whole()[order]])
        sequence, position = sequence[order], position[order]
    start = 0
    for block, gate in zip(ids, gates, strict=False):
        here = slice(start, start + len(block))
        yield ForeignRows(
            path=path,
            layers=tuple(range(experts.shape[1])),
            experts=_with_choices(block),
            sequence=sequence[here],
            position=position[here],
            phase=np.full(len(block), DECODE),
            weights=None if gate is None else _with_choices(gate),
            num_bytes=path.stat().st_size * len(block) // experts.shape[0],
        )
        start += len(block)


def _blocks(stream: ArrayStream) -> Iterator[npt.NDArray[Any]]:
    """Blocks of an array by rows. Ids and weights get the same rows: as many as make a block of int64."""
    return stream.blocks(rows_in_a_block(int(np.prod(stream.shape[1:])), np.dtype(np.int64)))


def _places(path: Path, archive: zipfile.ZipFile, tokens: int) -> tuple[Numbers, Numbers]:
    """Sequence and position [tokens] of each row, sequences numbered from 0."""
    names = archive.namelist()
    position = None
    if "pos.npy" in names:
        position = _place(path, archive, "pos", tokens, 1 << 31).astype(np.int32)
    if "seq.npy" in names:
        ids = _place(path, archive, "seq", tokens, 1 << 63)
    elif position is not None:
        ids = np.cumsum(np.diff(position, prepend=-1) <= 0)
    else:
        ids = np.zeros(tokens, np.int64)
    sequence = np.unique(ids, return_inverse=True)[1].astype(np.int32)
    return sequence, count_up(sequence) if position is None else position


def _place(path: Path, archive: zipfile.ZipFile, name: str, tokens: int, stop: int) -> IntArray:
    """[tokens] of the array `name`, whose shape is looked at before it is read."""
    stream = _member(archive, name)
    if stream.shape != (tokens,):
        raise InputError(f"{path}: {name}: shape is {stream.shape}; {(tokens,)} is needed to match experts")
    if stream.dtype.kind not in "iu":
        raise InputError(f"{path}: {name}: dtype is {stream.dtype}; give integers")
    blocks = list(_blocks(stream))
    for block in blocks:
        try:
            checked_integers(name, block, block.dtype, block.shape, stop)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return np.concatenate([block.astype(np.int64) for block in blocks])


def _check_experts(path: Path, experts: ArrayStream, archive: zipfile.ZipFile) -> None:
    if len(experts.shape) not in (2, 3) or 0 in experts.shape[1:]:
        raise InputError(
            f"{path}: experts: shape is {experts.shape}; "
            f"give [tokens, layers, top_k] or [tokens, layers], none of them 0"
        )
    if experts.dtype.kind not in "iu":
        raise InputError(f"{path}: experts: dtype is {experts.dtype}; give integers")
    packed = archive.getinfo("experts.npy").compress_size
    if experts.num_bytes > max(_BOMB_BYTES, _BOMB_RATIO * packed):
        raise InputError(
            f"{path}: experts: declares {experts.num_bytes} bytes in {packed}, more than ids compress by; "
            "save it again with numpy.savez"
        )


def _member(archive: zipfile.ZipFile, name: str) -> ArrayStream:
    info = archive.getinfo(f"{name}.npy")
    return ArrayStream(archive.open(info), info.file_size)


def _fact(path: Path, archive: zipfile.ZipFile, name: str, what: str, dims: int) -> npt.NDArray[Any]:
    stream = _member(archive, name)
    if len(stream.shape) > dims or stream.dtype.kind not in "iu" or stream.num_bytes > _MOST_FACTS:
        raise InputError(f"{path}: {name}: is {stream.dtype} {stream.shape}; give {what}")
    return stream.whole()


def _number(path: Path, archive: zipfile.ZipFile) -> int:
    array = _fact(path, archive, "num_experts", "one integer", 1)
    if array.size != 1:
        raise InputError(f"{path}: num_experts: is {array.dtype} {array.shape}; give one integer")
    return int(array.item())


def _counts(path: Path, archive: zipfile.ZipFile) -> tuple[int, ...]:
    array = _fact(path, archive, "experts_per_layer", "one integer for each layer", 1)
    if array.ndim != 1 or not array.size:
        raise InputError(
            f"{path}: experts_per_layer: is {array.dtype} {array.shape}; give one integer for each layer"
        )
    if array.min() < 1:
        raise InputError(f"{path}: experts_per_layer: holds {array.min()}; give 1 or more")
    return tuple(array.tolist())


def _with_choices(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array[:, :, np.newaxis] if array.ndim == 2 else array
