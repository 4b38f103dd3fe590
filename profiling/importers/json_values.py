"""JSON and JSONL files, one value in memory at a time."""

import codecs
import itertools
import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from exflow.encodings import wide_encoding
from exflow.errors import InputError
from exflow.profiling.importers.left_out import LeftOut

MAX_BYTES = 1 << 29  # of one value's text: some 200,000 tokens of the widest models


def json_values(path: Path, left: LeftOut) -> Iterator[tuple[str, Any, int]]:
    """The values of a file, each with its place ("line 3") and the bytes it took.

    Either one value a line (JSONL), or one value over all lines; the entries of a list are values of their
    own. Lines that never were JSON (what a proxy wrote) and a last one that was cut off are left out. Raises
    InputError where the text is not UTF-8 or not JSON, or one value is larger than MAX_BYTES.
    """
    with path.open("rb") as file:
        check_encoding(path, file.read(4))
        file.seek(0)
        bytes_left = path.stat().st_size
        is_first = True
        for number in itertools.count(1):
            line = _next_line(path, file)
            if not line:
                return
            bytes_left -= len(line)
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            place = f"line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if is_first and bytes_left and looks_like_json(line):
                    yield from _entries(_whole(path), "", path.stat().st_size)
                    return
                is_cut = not (is_first or bytes_left or line.endswith(b"\n"))
                _leave_out(f"{path}: {place}", line, is_cut, error, left)
                is_first = False
                continue
            is_first, size = False, len(line)
            del line  # it may be as large as the value
            yield from _entries(value, place, size)


def looks_like_json(start: bytes) -> bool:
    """True if a text begins with an object or a list, also after nulls or a byte order mark."""
    return re.match(rb"(\xef\xbb\xbf)?\s*(null\s*)*[{\[]", start) is not None


def check_encoding(path: Path, start: bytes) -> None:
    """InputError, with what it is, for text that is not UTF-8."""
    wide = wide_encoding(start)
    if wide is not None:
        raise InputError(f"{path}: is {wide} text; save it as UTF-8 (iconv -f {wide} -t UTF-8)")


def shown(value: Any) -> str:
    """The value as an error can quote it, in one short line."""
    return reprlib.repr(value)


def _leave_out(where: str, line: bytes, is_cut: bool, error: Exception, left: LeftOut) -> None:
    """A line that never was JSON, or ends where the file was cut; InputError for other damage."""
    text = line.strip().decode("utf-8", "replace")
    if not looks_like_json(line):
        left.add("lines that are not JSON", f"{where}: is {shown(text)}")
    elif is_cut:
        left.add("lines that were cut off", f"{where}: ends in {shown(text[-20:])}")
    else:
        raise _not_json(where, error) from error


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
        raise _not_json(f"{path}: the file", error) from error


def _not_json(where: str, error: Exception) -> InputError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return InputError(f"{where} is not valid JSON ({reason}); give the file whole")


def _entries(value: Any, place: str, size: int) -> Iterator[tuple[str, Any, int]]:
    if not isinstance(value, list):
        yield place or "the file", value, size
        return
    for index, entry in enumerate(value):
        yield f"{place}[{index}]", entry, size // len(value)
