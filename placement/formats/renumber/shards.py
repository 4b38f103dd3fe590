"""Safetensors files as bytes: their header is read and written here, their data is copied in ranges.

So every dtype is copied, those that numpy lacks too, and memory does not depend on the size of a tensor.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from exflow.errors import InputError
from exflow.placement.formats.renumber.permute import Change
from exflow.profiling.safetensors_header import read_header

REMEDY = "copy the checkpoint again, or give another"
_CHUNK = 1 << 20  # in the cache of a core: chunks of 4 MiB took up to three times as long
_ALIGNED = 8


@dataclass(frozen=True)
class Tensor:
    """A tensor of a shard; its data are the bytes begin..end behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header has been read. data_start: position of the data in the file."""

    path: Path
    tensors: tuple[Tensor, ...]
    metadata: Any
    data_start: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the header; raises InputError if the file is missing, truncated or no safetensors file."""
        try:
            with path.open("rb") as file:
                header, data_start = read_header(path, file, REMEDY)
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such weights; {REMEDY}") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
        metadata = header.pop("__metadata__", None)
        try:
            parts = [_tensor(name, entry) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: the header is damaged ({error}); {REMEDY}") from error
        tensors = tuple(sorted(parts, key=lambda one: (one.begin, one.end)))
        _check_data(path, tensors, path.stat().st_size - data_start)
        return cls(path, tensors, metadata, data_start)

    def write(self, path: Path, changes: Mapping[str, Change], copied: Callable[[int], None]) -> None:
        """Write the changed shard; `copied` is called with the number of bytes after each chunk."""
        entries: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        for one in self.tensors:
            offsets = [one.begin, one.end]
            entries[changes[one.name].name] = {
                "dtype": one.dtype,
                "shape": one.shape,
                "data_offsets": offsets,
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNED)
        with self.path.open("rb", buffering=0) as source, path.open("wb", buffering=0) as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for begin, end in _joined(self._ranges(changes)):
                _copy(source, target, self.data_start + begin, end - begin, copied)

    def _ranges(self, changes: Mapping[str, Change]) -> Iterator[tuple[int, int]]:
        """The ranges of the old data, in the order of the new data."""
        for one in self.tensors:
            rows = changes[one.name].rows
            if rows is None:
                yield one.begin, one.end
                continue
            size, rest = divmod(one.end - one.begin, len(rows))
            if rest:
                raise InputError(
                    f"{self.path}: '{one.name}' has {one.end - one.begin} bytes, which {len(rows)} experts "
                    f"do not share equally; {REMEDY}"
                )
            for row in rows:
                yield one.begin + row * size, one.begin + (row + 1) * size


def _tensor(name: str, entry: Any) -> Tensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if not isinstance(dtype, str) or not all(type(one) is int and one >= 0 for one in (*shape, begin, end)):
        raise ValueError(f"'{name}' has no dtype, shape and offsets")
    return Tensor(name, dtype, shape, begin, end)


def _check_data(path: Path, tensors: tuple[Tensor, ...], size: int) -> None:
    """Raise InputError unless the tensors fill `size` bytes without gaps."""
    position = 0
    for one in tensors:
        if one.begin != position or one.end < one.begin:
            raise InputError(f"{path}: '{one.name}' begins at {one.begin}, not at {position}; {REMEDY}")
        position = one.end
    if position != size:
        raise InputError(
            f"{path}: has {size} bytes of data, the header says {position}, truncated?; {REMEDY}"
        )


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join neighbouring ranges, so that a shard is copied in few long ones."""
    begin = end = 0
    for first, last in ranges:
        if first != end:
            yield begin, end
            begin = first
        end = last
    yield begin, end


def _copy(
    source: BinaryIO, target: BinaryIO, position: int, length: int, copied: Callable[[int], None]
) -> None:
    source.seek(position)
    buffer = memoryview(bytearray(min(length, _CHUNK)))
    while length:
        try:
            count = source.readinto(buffer[: min(length, _CHUNK)])  # type: ignore[attr-defined]
        except OSError as error:
            raise InputError(f"{source.name}: cannot be read ({error.strerror}); {REMEDY}") from error
        if not count:
            raise InputError(f"{source.name}: ended while it was copied; {REMEDY}")
        written = 0
        while written < count:
            written += target.write(buffer[written:count])
        length -= count
        copied(count)
