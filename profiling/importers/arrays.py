"""A numpy array in a stream, read block by block, so that neither its size nor a lie about it matters."""

import math
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from exflow.profiling.importers.foreign import BLOCK_BYTES

MAX_WHOLE = 1 << 30  # bytes of an array that has to be read in one piece


class ArrayStream:
    """The array of a .npy stream that is `size` bytes long; nothing is unpickled.

    Raises ValueError for a damaged header, for Python objects, and where the header declares another number
    of bytes than there are: before anything of that size is allocated.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} of the .npy format holds no plain numbers")
        self.shape: tuple[int, ...] = header[0]
        self._by_columns: bool = header[1]
        self.dtype: np.dtype[Any] = header[2]
        if self.dtype.hasobject:
            raise ValueError("the array holds Python objects, which are never loaded")
        if any(length < 0 for length in self.shape):
            raise ValueError(f"the header declares the shape {self.shape}")
        declared, found = math.prod(self.shape) * self.dtype.itemsize, size - file.tell()
        if declared != found:
            raise ValueError(f"the header declares {declared} bytes of data, there are {found}")
        self._file = file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> npt.NDArray[Any]:
        """The array; ValueError where it ends early or is too large to be held."""
        if self.num_bytes > MAX_WHOLE:
            raise ValueError(
                f"{self.num_bytes} bytes in one piece; save rows in order of position, arrays in C order"
            )
        content = b"".join(self._chunks(self.num_bytes))
        array = np.frombuffer(content, self.dtype)
        if self._by_columns:
            return array.reshape(self.shape[::-1]).transpose()
        return array.reshape(self.shape)

    def blocks(self, rows: int) -> Iterator[npt.NDArray[Any]]:
        """The array in pieces of at most `rows` along the first axis; ValueError where it ends early."""
        if self._by_columns:
            array = self.whole()
            yield from (array[start : start + rows] for start in range(0, len(array), rows))
            return
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        for start in range(0, self.shape[0], rows):
            count = min(rows, self.shape[0] - start)
            content = b"".join(self._chunks(count * row_bytes))
            yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])

    def _chunks(self, num_bytes: int) -> Iterator[bytes]:
        while num_bytes:  # a compressed stream may be shorter than its directory says
            content = self._file.read(min(num_bytes, BLOCK_BYTES))
            if not content:
                raise ValueError(f"the data end {num_bytes} bytes early")
            num_bytes -= len(content)
            yield content


def rows_in_a_block(row_items: int, dtype: np.dtype[Any]) -> int:
    """The number of rows of `row_items` numbers that make up a block."""
    return max(1, BLOCK_BYTES // max(1, row_items * dtype.itemsize))
