"""Text files: lookup of the files that a user names, and reading as UTF-8."""

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
    """List the text files at `names`: files, folders (their .txt, .md, .rst and .py files), and "{stdlib}".

    "{stdlib}" stands for the Python sources of the standard library.
    """
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
        subfolders[:] = set(subfolders).difference(STDLIB_LEFT_OUT)  # os.walk enters only these
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, without its byte-order mark and with \\n as line ending.

    Raises InputError for binary files and any other encoding; the message names what the file is.
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
