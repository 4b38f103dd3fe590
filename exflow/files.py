"""File reading with clear errors for bad input, and atomic writing: a stop leaves nothing half-written."""

import errno
import json
import os
import tempfile
import uuid
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from exflow.encodings import utf8_text
from exflow.errors import InputError

MAX_YAML_BYTES = 1 << 20
MAX_YAML_SCALAR = 4096  # characters of one name, path or number
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not.

    Readers see the old file or the whole new one, never a part. Raises InputError if the place cannot be
    written: the folder cannot be made, or the disk is full.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is a device or the like, which a file would replace; choose another place")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:  # the temporary file is made inside, so that a signal at any moment removes it
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        _reach_the_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; it takes the place of `path` if the block succeeds, and vanishes if not.

    A folder that was at `path` is removed once the new one is complete. Raises InputError if the place
    cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            try:
                yield new
            except InputError as error:  # it names the temporary folder, which the user does not know
                raise InputError(str(error).replace(str(new), str(path))) from error
            for file in filter(Path.is_file, new.rglob("*")):
                _reach_the_disk(file)
            try:
                if path.exists():
                    path.rename(old)
                new.rename(path)
            except BaseException:
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
    except OSError as error:
        raise _unwritable(path, error) from error


def _reach_the_disk(file: Path) -> None:
    """Wait until the file is on disk: quotas and network file systems may report an error only at fsync."""
    with file.open("rb") as opened:
        os.fsync(opened)


def _unwritable(path: Path, error: OSError) -> InputError:
    remedy = "make room there, or choose another place" if error.errno in FULL else "choose another place"
    return InputError(f"{path}: cannot be written ({error.strerror}); {remedy}")


def check_writable(path: Path) -> None:
    """Raise InputError if nothing can be made at `path`. Called before long work; changes nothing."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot be written ({folder} is no folder to write to); choose another")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Read a JSON file; `what` names it and `remedy` says what to do, both for an InputError's message."""
    try:
        return json.loads(utf8_text(path.read_bytes()))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such {what}; {remedy}") from error
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise InputError(f"{path}: the {what} is not valid JSON ({error}); {remedy}") from error


def unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raises ValueError for a key that is given twice (an `object_pairs_hook`)."""
    built: dict[str, Any] = {}
    for key, value in pairs:
        if key in built:
            raise ValueError(f"'{key}' is given twice")
        built[key] = value
    return built


def read_yaml(path: Path, what: str, remedy: str) -> Any:
    """Read a YAML file of at most MAX_YAML_BYTES with PlainLoader; `what` and `remedy` as in read_json."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror}); {remedy}") from error
    if len(content) > MAX_YAML_BYTES:
        raise InputError(f"{path}: the {what} is longer than {MAX_YAML_BYTES} bytes; {remedy}")
    try:
        return yaml.load(utf8_text(content), Loader=PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InputError(f"{path}: the {what} is not YAML ({line}{error.problem}); {remedy}") from error
    except RecursionError as error:
        raise InputError(f"{path}: the {what} is not YAML (nested too deeply); {remedy}") from error
    except Exception as error:  # PyYAML does not catch the errors of int(), datetime and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: the {what} is not YAML ({reason}); {remedy}") from error


class PlainLoader(yaml.SafeLoader):
    """SafeLoader that refuses anchors, aliases and tags, by which a small file grows large.

    It also refuses long scalars and duplicate keys.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_YAML_SCALAR:
            problem = f"a name or number has more than {MAX_YAML_SCALAR} characters"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            problem = "anchors, aliases and tags are not for this file"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
