"""The tensors of a safetensors file, one at a time, whatever the header claims."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError

_DTYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8"}
_MAX_HEADER = 100_000_000  # what the library itself reads at most


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
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise InputError(f"{path}: is truncated ({size} bytes end inside the header); {remedy}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: the header is not JSON ({error}); {remedy}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is not a JSON object; {remedy}")
    header.pop("__metadata__", None)
    return {name: _place(path, name, entry, 8 + length, size, remedy) for name, entry in header.items()}


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
