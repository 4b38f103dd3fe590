"""One shard of a trace: a safetensors file, written whole and read through a memory map."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from exflow.errors import InputError
from exflow.files import atomic_path
from exflow.profiling.index import Shard, TraceIndex
from exflow.profiling.safetensors_header import read_header

Rows = dict[str, npt.NDArray[Any]]
"""Rows of a trace by tensor name: experts, sequence, position, phase and, where recorded, weights."""

_TYPE_CODE = {"uint8": "U8", "uint16": "U16", "int32": "I32", "float16": "F16"}  # numpy -> safetensors
_REMEDY = "the file is damaged: restore the trace from a copy, or record it again"


def num_rows(rows: Rows) -> int:
    return len(rows["experts"])


def row_slice(rows: Rows, start: int, stop: int) -> Rows:
    """Views of the rows start..stop-1."""
    return {name: array[start:stop] for name, array in rows.items()}


def concatenate(blocks: list[Rows]) -> Rows:
    """The rows of all blocks in order; a single block is returned as it is, so a memory map stays one."""
    if len(blocks) == 1:
        return blocks[0]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def joined_in_a_file(blocks: list[Rows]) -> Rows:
    """Concatenate `blocks` in a memory-mapped file without a name, which is deleted when the rows are.

    So rows of any number take no memory that the system cannot have back. The file is where temporary files
    are (TMPDIR). Raises InputError where it finds no room there.
    """
    rows: Rows = {}
    try:
        with tempfile.TemporaryFile(prefix="exflow-") as file:
            for name, first in blocks[0].items():
                start = file.tell()
                for block in blocks:
                    file.write(np.ascontiguousarray(block[name]).data)
                file.flush()
                shape = (sum(len(block[name]) for block in blocks), *first.shape[1:])
                rows[name] = np.memmap(file, dtype=first.dtype, mode="r", offset=start, shape=shape)
    except OSError as error:
        size = sum(array.nbytes for block in blocks for array in block.values())
        raise InputError(
            f"{tempfile.gettempdir()}: the trace's {size >> 20} MiB cannot be joined there "
            f"({error.strerror}); set TMPDIR to a folder with room"
        ) from error
    return rows


def write_shard(path: Path, rows: Rows) -> None:
    """Write `rows` atomically; InputError where the folder cannot be written."""
    content = save({name: np.ascontiguousarray(array) for name, array in rows.items()})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def map_shard(folder: Path, shard: Shard, index: TraceIndex) -> Rows:
    """Memory-map the tensors of one shard, read-only; only the header is read.

    Raises InputError naming the file where it is missing or truncated, or where a tensor is missing or of
    another dtype or shape than the index says.
    """
    path = folder / shard.file
    try:
        with path.open("rb") as file:
            header, data_start = read_header(path, file, _REMEDY)
        data_size = path.stat().st_size - data_start
        rows: Rows = {}
        for name, dtype, shape in _expected(shard, index):
            begin = _checked_begin(path, header, name, dtype, shape, data_size)
            little = dtype.newbyteorder("<")
            rows[name] = np.memmap(path, dtype=little, mode="r", offset=data_start + begin, shape=shape)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such shard, though the index lists it; {_REMEDY}") from error
    except OSError as error:
        raise InputError(f"{path}: the shard cannot be read ({error.strerror}); {_REMEDY}") from error
    return rows


def _expected(shard: Shard, index: TraceIndex) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    tokens = shard.num_tokens
    choices = (tokens, len(index.moe_layer_ids), index.top_k)
    yield "experts", np.dtype(index.dtype), choices
    yield "sequence", np.dtype(np.int32), (tokens,)
    yield "position", np.dtype(np.int32), (tokens,)
    yield "phase", np.dtype(np.uint8), (tokens,)
    if index.has_weights:
        yield "weights", np.dtype(np.float16), choices


def _checked_begin(
    path: Path,
    header: dict[str, Any],
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    data_size: int,
) -> int:
    """The offset of tensor `name` in the data, once the header agrees with what the index promises."""
    if name not in header:
        raise InputError(f"{path}: has no tensor {name}; {_REMEDY}")
    try:
        code, found = header[name]["dtype"], list(header[name]["shape"])
        begin, end = (int(offset) for offset in header[name]["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: the header's entry for {name} is malformed; {_REMEDY}") from error
    wanted = _TYPE_CODE[dtype.name]
    if code != wanted or found != list(shape):
        raise InputError(
            f"{path}: {name} is {code} {found}, the index says {wanted} {list(shape)}; {_REMEDY}"
        )
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{path}: the header gives {name} the bytes {begin} to {end}; {_REMEDY}")
    if end > data_size:
        raise InputError(f"{path}: is truncated ({name} ends at byte {end} of {data_size}); {_REMEDY}")
    return begin
