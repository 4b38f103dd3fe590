"""The tensors of a safetensors file, one at a time, whatever the header claims."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.safetensors_header import read_header

_DTYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8"}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of integers: its dtype, shape and first byte in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def read(self, file: IO[bytes]) -> npt.NDArray[Any]:
        file.seek(self.offset)
        content = file.read(math.prod(self.shape) * self.dtype.itemsize)
        return np.frombuffer(content, self.dtype).reshape(self.shape)


def tensor_places(path: Path, remedy: str) -> dict[str, TensorPlace]:
    """The place of each tensor by name; InputError unless all are of integers and inside the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header, start = read_header(path, file, remedy)
    header.pop("__metadata__", None)
    return {name: _place(path, name, entry, start, size, remedy) for name, entry in header.items()}


def _place(path: Path, name: str, entry: Any, start: int, size: int, remedy: str) -> TensorPlace:
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        plain = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: the header's entry for {name[:40]!r} is no tensor of integers ({error}); {remedy}"
        ) from error
    if not plain or end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
        raise InputError(
            f"{path}: {name[:40]!r} has the shape {list(shape)} and the bytes {begin} to {end} of "
            f"{size - start}; {remedy}"
        )
    return TensorPlace(dtype, shape, start + begin)
