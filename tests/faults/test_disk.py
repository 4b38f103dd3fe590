"""A disk that is full: a line that names the file, the old file as it was, and nothing left behind."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from exflow.errors import InputError
from exflow.files import atomic_folder, atomic_path, write_json

COMMANDS = {
    "profile": (
        "profile model --text book.txt --tokens 12000 -o disk/trace",
        "disk/trace/shard-00001.safetensors",
    ),
    "import": ("import routing.npz -o disk/trace", "disk/trace/index.json"),
    "place": ("place trace --gpus 4 --method contiguous -o disk/plan.json", "disk/plan.json"),
    "balance": ("balance loads.json --gpus 2 -o disk/plan.json", "disk/plan.json"),
    "report": ("report trace plan.json -o disk/report.html", "disk/report.html"),
    "train": ("train tiny.yaml -o disk/run", "disk/run/step-000000/config.json"),
    "generate": (
        "generate model --prompt Rain --max-new-tokens 60 --ignore-end --trace disk/trace",
        "disk/trace/shard-00001.safetensors",
    ),
}


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """The inputs, and what stands on the disk from former times."""
    copy = Path(shutil.copytree(inputs, tmp_path / "work"))
    (copy / "disk").mkdir()
    for name in ("plan.json", "report.html"):
        shutil.copy(copy / name, copy / "disk")
    shutil.copytree(copy / "trace", copy / "disk" / "trace")
    return copy


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=[pytest.mark.all] if verb == "report" else []) for verb in COMMANDS]
)
def test_a_file_that_may_grow_no_more(verb: str, folder: Path, verbs: Any) -> None:
    """RLIMIT_FSIZE, which says of a file what a full disk says of all; of a cache of compiled code, too."""
    line, named = COMMANDS[verb]
    before = content(folder)
    code, out, err = verbs.run(folder, line, limit=200)
    reason = "cannot be written (File too large); make room there, or choose another place"
    assert (code, out, err) == (2, "", f"exflow: {named}: {reason}\n")
    assert content(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", ["profile", *(pytest.param(verb, marks=pytest.mark.all) for verb in ("place", "report"))]
)
def test_a_disk_that_is_full(verb: str, folder: Path, verbs: Any) -> None:
    """The cache of compiled code lies on it, and is empty: the command compiles, and keeps nothing."""
    line, named = COMMANDS[verb]
    before = content(folder / "disk")
    used = sum(-(-len(data) // 4096) * 4 for data in before.values())
    code, out, err = verbs.run(folder, line, disk=used)
    if err == "no mounts\n":
        pytest.skip("a disk of our own needs root and mount namespaces")
    reason = "cannot be written (No space left on device); make room there, or choose another place"
    assert (code, out, err) == (2, "", f"exflow: {named}: {reason}\n")
    assert content(folder / "after") == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A quota or a network file system may lose written data only at fsync."""

    def refuse(file: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a"
    write_json(path, "old")
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=rf"a: cannot be written \({os.strerror(number)}\)"):
        write_json(path, "new")
    with pytest.raises(InputError, match=r"b: cannot be written"), atomic_folder(tmp_path / "b") as new:
        (new / "deep").mkdir()
        (new / "deep" / "file").touch()
    assert content(tmp_path) == {"a": b'"old"\n'}


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    """Root could: -o /dev/null would leave a file there."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is a device or the like"), atomic_path(tmp_path / "pipe"):
        pytest.fail("the block must not run")
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]
