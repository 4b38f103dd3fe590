"""Atomic writing: readers see the old content or the whole new one, and nothing is left over."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exflow.errors import InputError
from exflow.files import atomic_folder, atomic_path, read_json, read_yaml, write_json


class Stop(Exception):
    """Something went wrong in the middle of writing."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask_027() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # so that the rename stays inside one file system
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


def test_an_exception_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(Stop), atomic_path(path) as temporary:
        temporary.write_text("ha")
        raise Stop
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.usefixtures("umask_027")
def test_permissions_are_ordinary(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.txt"):
        pass
    with atomic_folder(tmp_path / "b") as temporary:
        (temporary / "c.txt").touch()
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "b" / "c.txt").stat().st_mode & 0o777 == 0o640


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.txt"
    for atomic in (atomic_path, atomic_folder):
        with pytest.raises(InputError) as error, atomic(path):
            pytest.fail("the block must not run")
        assert str(error.value) == f"{path}: cannot be written (File exists); choose another place"


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError) as error:
        write_json(tmp_path / "a", 1)
    assert str(error.value) == f"{tmp_path / 'a'}: cannot be written (Is a directory); choose another place"
    assert names(tmp_path) == ["a"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    for content in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / f"{content}.txt").write_text(content)
            assert not (path / f"{content}.txt").exists()
        assert names(path) == [f"{content}.txt"]
        assert names(path.parent) == ["a"]


def test_an_exception_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "old.txt").touch()
    with pytest.raises(Stop), atomic_folder(path) as temporary:
        (temporary / "new.txt").touch()
        raise Stop
    assert names(path) == ["old.txt"]
    assert names(tmp_path) == ["a"]


def test_a_stop_between_the_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "old.txt").touch()
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path):
        pass
    assert names(path) == ["old.txt"]
    assert names(tmp_path) == ["a"]


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"name": "élan ✓", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "list", "make it") == value
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(InputError) as error:
        read_json(path, "plan", "make it with exflow place")
    assert str(error.value) == f"{path}: no such plan; make it with exflow place"

    path.write_text('{"a": 1,')
    with pytest.raises(InputError, match=r"a.json: the plan is not valid JSON \(.*line 1.*\); make it$"):
        read_json(path, "plan", "make it")

    path.write_bytes(b'"\xff"')
    with pytest.raises(InputError, match=r"the plan is not valid JSON .*can't decode byte 0xff"):
        read_json(path, "plan", "make it again")

    with pytest.raises(InputError) as error:
        read_json(tmp_path, "plan", "make it again")
    assert str(error.value) == f"{tmp_path}: the plan cannot be read (Is a directory); make it again"

    path.write_text("[" * 20_000)
    with pytest.raises(InputError, match=r"the plan is not valid JSON \(.*recursion.*\); make it again"):
        read_json(path, "plan", "make it again")


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: [1, 2.5, null]\nb: {c: élan}")
    assert read_yaml(path, "plan", "make it") == {"a": [1, 2.5, None], "b": {"c": "élan"}}
    for text in (
        "a: &a 1",
        "a: !!int 1",
        "a: !!python/name:os.system",
        "a: 2001-13-45",
        "[" * 20_000,
        "a: [1",
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=r"a.yaml: the plan is not YAML \(.+\); make it$"):
            read_yaml(path, "plan", "make it")
    path.write_bytes(b" " * (1 << 21))
    with pytest.raises(InputError, match=r"the plan is longer than 1048576 bytes; make it$"):
        read_yaml(path, "plan", "make it")
    with pytest.raises(InputError, match=r"the plan cannot be read \(Is a directory\); make it$"):
        read_yaml(tmp_path, "plan", "make it")


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_byte_order_mark_and_other_encodings(tmp_path: Path, read: Callable[[Path, str, str], Any]) -> None:
    path, content = tmp_path / "a", '{"a": "é"}'
    path.write_bytes(content.encode("utf-8-sig"))
    assert read(path, "plan", "make it") == {"a": "é"}
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_bytes(content.encode(encoding))
        with pytest.raises(
            InputError, match=rf"\(it is {encoding[:6].upper()} text; save it as UTF-8\); make it$"
        ):
            read(path, "plan", "make it")


def test_a_message_is_one_line_that_steers_no_terminal() -> None:
    assert str(InputError("a\nb\r\x1b[2J\u2028 é \ud800")) == r"a\nb\r\x1b[2J\u2028 é \ud800"
