"""JSON and JSONL files, one value in memory at a time."""

import itertools
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from exflow.errors import InputError

MAX_BYTES = 1 << 29  # of one value's text: some 200,000 tokens of the widest models


def json_values(path: Path) -> Iterator[tuple[str, Any, int]]:
    """The values of a file, each with its place ("line 3") and the bytes it took.

    Either one value a line (JSONL), or one value over all lines; the entries of a list are values of their
    own. Raises InputError where the text is not JSON or one value is larger than MAX_BYTES.
    """
    with path.open("rb") as file:
        bytes_left = path.stat().st_size
        is_first = True
        for number in itertools.count(1):
            line = _next_line(path, file)
            if not line:
                return
            bytes_left -= len(line)
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not is_first or not bytes_left:
                    raise _not_json(path, place, error) from error
                yield from _entries(_whole(path), "", path.stat().st_size)
                return
            is_first, size = False, len(line)
            del line  # it may be as large as the value
            yield from _entries(value, place, size)


def shown(value: Any) -> str:
    """The value as an error can quote it, in one short line."""
    return reprlib.repr(value)


def _next_line(path: Path, file: IO[bytes]) -> bytes:
    line = file.readline(MAX_BYTES + 1)
    if len(line) > MAX_BYTES:
        raise InputError(
            f"{path}: a line has more than {MAX_BYTES} bytes; write one response a line, of shorter requests"
        )
    return line


def _whole(path: Path) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: has more than {MAX_BYTES} bytes; write one response a line (JSONL)")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _not_json(path, "the file", error) from error


def _not_json(path: Path, place: str, error: Exception) -> InputError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return InputError(f"{path}: {place} is not valid JSON ({reason}); give the file whole")


def _entries(value: Any, place: str, size: int) -> Iterator[tuple[str, Any, int]]:
    if not isinstance(value, list):
        yield place or "the file", value, size
        return
    for index, entry in enumerate(value):
        yield f"{place}[{index}]", entry, size // len(value)
