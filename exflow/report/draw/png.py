"""A table of levels as a PNG: the smallest way to put thousands of cells on a page."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NOTHING = 0  # the level of a cell without a value: transparent

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _INDEXED = 0, 3  # colour types

Levels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]


def levels_of(values: npt.NDArray[np.floating], low: float, high: float) -> Levels:
    """Map values from low to high to levels 1 to 255; values beyond are clipped, NaN becomes NOTHING."""
    share = (np.nan_to_num(values) - low) / ((high - low) or 1.0)
    levels = 1 + np.rint(254 * np.clip(share, 0, 1))
    return np.asarray(np.where(np.isnan(values), NOTHING, levels), dtype=np.uint8)


def data_uri(levels: Levels, palette: Sequence[Colour] | None = None) -> str:
    """Encode one pixel a cell as a data URI. Without a palette of 256 colours it is grey."""
    return "data:image/png;base64," + b64encode(encode(levels, palette)).decode()


def encode(levels: Levels, palette: Sequence[Colour] | None = None) -> bytes:
    rows, columns = levels.shape
    kind = _GREY if palette is None else _INDEXED
    parts = [_chunk(b"IHDR", struct.pack(">2I5B", columns, rows, 8, kind, 0, 0, 0))]
    if palette is None:
        parts.append(_chunk(b"tRNS", struct.pack(">H", NOTHING)))
    else:
        parts += [_chunk(b"PLTE", bytes(np.array(palette, np.uint8).tobytes())), _chunk(b"tRNS", b"\x00")]
    scanlines = np.pad(levels, ((0, 0), (1, 0)))  # each begins with its filter: 0, none
    parts += [_chunk(b"IDAT", zlib.compress(scanlines.tobytes(), 9)), _chunk(b"IEND", b"")]
    return _SIGNATURE + b"".join(parts)


def decode(content: bytes) -> Levels:
    """Decode the levels of an image that `encode` made."""
    columns, rows = struct.unpack(">2I", content[16:24])
    start = content.index(b"IDAT") + 4
    scanlines = zlib.decompressobj().decompress(content[start:])
    return np.frombuffer(scanlines, np.uint8).reshape(rows, columns + 1)[:, 1:]


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
