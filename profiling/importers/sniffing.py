"""Tells a file's format from its first bytes."""

import codecs
from pathlib import Path

from exflow.errors import InputError
from exflow.profiling.importers.json_values import check_encoding, looks_like_json

START = 4096  # bytes that are looked at

_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}


def start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(START)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file to import") from error


def is_blank(path: Path) -> bool:
    """True if a file holds only whitespace: a rank had no tokens, or a request failed."""
    start = start_of(path)
    return len(start) < START and not start.removeprefix(codecs.BOM_UTF8).strip()


def is_text(start: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # which may end within a character
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def is_zip(start: bytes) -> bool:
    return start.startswith(b"PK\x03\x04")


def is_torch(start: bytes) -> bool:
    """True if an archive's first member is the one that torch.save writes first."""
    length = int.from_bytes(start[26:28], "little")
    return is_zip(start) and start[30 : 30 + length].endswith(b"/data.pkl")


def is_safetensors(start: bytes) -> bool:
    """True if the bytes begin with the length of a JSON header, and are no text in UTF-16."""
    return start[4:9] == b"\0\0\0\0{"


def is_json(start: bytes) -> bool:
    """True for JSON, even if not from the first line on: the file may be cut, or a proxy answered first."""
    return looks_like_json(start) or (is_text(start) and any(map(looks_like_json, start.splitlines())))


def is_megatron(start: bytes) -> bool:
    return is_json(start) and b'"top_indices"' in start


def unknown(path: Path, start: bytes, formats: str) -> InputError:
    """The error for a file of no format; of text in another encoding check_encoding complains."""
    check_encoding(path, start)
    packed = next((name for mark, name in _PACKED.items() if start.startswith(mark)), None)
    if packed is not None:
        return InputError(f"{path}: is packed by {packed}; unpack it first")
    return InputError(f"{path}: is in no format known here ({formats}); convert it to one of them")
