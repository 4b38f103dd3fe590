"""The header of a safetensors file: 8 bytes of length (little-endian), then JSON, then the tensors."""

import json
from pathlib import Path
from typing import IO, Any

from exflow.errors import InputError
from exflow.files import unique_keys

_MAX_BYTES = 100_000_000  # the safetensors library reads no longer header


def read_header(path: Path, file: IO[bytes], remedy: str) -> tuple[dict[str, Any], int]:
    """The header's JSON, and the file offset of the tensors.

    Raises InputError where the header is damaged, or names a tensor twice.
    """
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_BYTES):
        raise InputError(f"{path}: is truncated ({size} bytes end inside the header); {remedy}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not JSON ({error}); {remedy}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is not a JSON object; {remedy}")
    return header, 8 + length
