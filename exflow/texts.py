"""Text files: which ones a user names, and reading them as UTF-8."""

import os
import sysconfig
from pathlib import Path

from exflow.encodings import utf8_text
from exflow.errors import InputError

SUFFIXES = (".txt", ".md", ".rst", ".py")
# pydoc_data (the language reference as text) stays unseen: the demo profiles text the model never read
STDLIB_LEFT_OUT = (
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "encodings",
)


def find_texts(names: list[str]) -> list[Path]:
    """Files and folders (searched for .txt, .md, .rst, .py); "{stdlib}" is the standard library's sources."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if name == "{stdlib}":
            files += _stdlib_sources()
        elif path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{name}: no such text file or folder; give files, folders or {{stdlib}}")
    if not files:
        raise InputError(f"no text found in {', '.join(names)}; give files ending in {', '.join(SUFFIXES)}")
    return files


def _stdlib_sources() -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders).difference(STDLIB_LEFT_OUT)  # os.walk then enters these alone
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. A byte-order mark is no part of it, and a line ends with \\n alone.

    Raises InputError, which says what the file is, for any other encoding and for binary files.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the text cannot be read ({error.strerror}); give another") from error
    try:
        text = utf8_text(content)
    except UnicodeDecodeError as error:
        line, byte = 1 + content.count(b"\n", 0, error.start), content[error.start]
        raise InputError(
            f"{path}: line {line} is not UTF-8 (byte 0x{byte:02x}); save the text as UTF-8, or give another"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: {error}, or give another") from error
    if "\0" in text:
        line = 1 + content.count(b"\n", 0, content.index(b"\0"))
        raise InputError(f"{path}: line {line} has a zero byte, so this is no text; give another")
    return text.replace("\r\n", "\n")
