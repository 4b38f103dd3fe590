"""Damage to files: to their bytes, to the numbers in their text, and to the structure of their format."""

import io
import json
import random
import re
import struct
import zipfile
from functools import lru_cache
from typing import Any

import yaml

from benchmarks.robustness.fuzz.trees import changed_tree, drawn, text_of

NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"256",
    b"65536",
    b"2147483648",
    b"18446744073709551616",
    b"1" * 40,
    b"9" * 5000,
)
SNIPPETS = (
    b"!!python/object:os.system {}",
    b"&a [*a, *a]",
    b"*a",
    b"? {",
    b"\x00",
    b"\xff\xfe",
    b"2001-13-45",
)


def mutated(rng: random.Random, content: bytes) -> bytes:
    """The content after one to three changes, or something drawn at random."""
    if rng.random() < 0.03:
        return text_of(rng, drawn(rng, 4))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if b"[" * 40 in content or b'{"a":' * 40 in content:  # so deep that the changes themselves would fail
            break
        content = rng.choice((changed_structure, changed_structure, changed_bytes, changed_numbers))(
            rng, content
        )
    return content


def changed_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, double, fill or interrupt bytes."""
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    match rng.randrange(6):
        case 0 if content:
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 1, 4))):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 1:
            return content[:start]
        case 2:
            return content[:start] + content[stop:]
        case 3:
            return content[:stop] + content[start:]
        case 4:
            return content[:start] + rng.choice((b"\xff", b"\x00")) * min(stop - start, 16) + content[stop:]
    return content[:start] + rng.choice(SNIPPETS) + content[start:]


def changed_numbers(rng: random.Random, content: bytes) -> bytes:
    """Replace a number in the text by another."""
    found = list(re.finditer(rb"-?\d+", content[: 1 << 16]))
    if not found:
        return changed_bytes(rng, content)
    chosen = rng.choice(found)
    return content[: chosen.start()] + rng.choice(NUMBERS) + content[chosen.end() :]


def changed_structure(rng: random.Random, content: bytes) -> bytes:
    """Change the content in the structure of its format; as bytes where the format is unknown."""
    if content.startswith(b"PK\x03\x04"):
        return changed_archive(rng, content)
    if content.startswith(b"\x93NUMPY"):
        return changed_npy(rng, content)
    if content[8:9] == b"{":
        return changed_safetensors(rng, content)
    rows = content.splitlines()
    if len(rows) > 1 and all(row.startswith(b"{") and row.endswith(b"}") for row in rows):
        chosen = rng.randrange(len(rows))
        rows[chosen] = changed_structure(rng, rows[chosen])
        return b"\n".join(rows) + b"\n"
    value = parsed(content)
    if not isinstance(value, dict | list) or b"&" in content:  # an anchor may make a tree without end
        return changed_bytes(rng, content)
    return text_of(rng, changed_tree(rng, value, changed_structure))


@lru_cache(maxsize=64)  # valid files come again and again
def parsed(content: bytes) -> Any:
    """The tree of JSON or YAML, not to be changed; None of anything else."""
    try:
        return json.loads(content) if content.lstrip()[:1] in (b"{", b"[") else yaml.safe_load(content)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def changed_archive(rng: random.Random, content: bytes) -> bytes:
    """Change one member, or its name; the archive stays whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged before
        return changed_bytes(rng, content)
    chosen = rng.randrange(len(members)) if members else -1
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number, (info, data) in enumerate(members):
            change = changed_npy if data.startswith(b"\x93NUMPY") else changed_bytes
            name = "../x" if number == chosen and rng.random() < 0.05 else info.filename
            archive.writestr(name, change(rng, data) if number == chosen else data, info.compress_type)
    return packed.getvalue()


def changed_npy(rng: random.Random, content: bytes) -> bytes:
    """Replace the header by another, of the length that it declares, or change bytes."""
    length = int.from_bytes(content[8:10], "little")
    if rng.random() < 0.3 or len(content) < 10 + length:
        return changed_bytes(rng, content)
    header = changed_numbers(rng, content[10 : 10 + length])
    if rng.random() < 0.3:
        header = re.sub(rb"'descr': '[^']*'", rng.choice((b"'descr': '|O'", b"'descr': '<U9999'")), header)
    return content[:8] + (len(header) & 0xFFFF).to_bytes(2, "little") + header + content[10 + length :]


def changed_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Replace the header by another of the length that it declares, or change the length."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return changed_bytes(rng, content)
    if rng.random() < 0.1 or not isinstance(header, dict):
        return struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 10**11))) + content[8:]
    text = text_of(rng, changed_tree(rng, header, changed_structure))
    return struct.pack("<Q", len(text)) + text + content[8 + length :]
