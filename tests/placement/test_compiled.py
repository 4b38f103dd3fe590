"""Compiled functions and their cache: it is used, and where it fails the function is what its source says."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numba
import pytest
from numba.core.caching import FunctionCache, IndexDataCacheFile

from exflow.placement.compiled import compiled

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plus(number: int, folder: Path) -> Callable[[int], int]:
    """A function of the same name, line and bytecode for each number, compiled as by a process of its own."""
    source, text = folder / "source.py", f"def plus(x):\n    return x + {number}\n"
    if not source.exists() or source.read_text() != text:  # older numba goes by the time of the file
        source.write_text(text)
    module = sys.modules["compiled_source"] = ModuleType("compiled_source")  # numba asks for it by its name
    exec(compile(text, str(source), "exec"), vars(module))  # no .pyc of the text before
    function: Callable[[int], int] = compiled(module.plus)
    return function


def files(cache: Path, suffix: str) -> list[Path]:
    return sorted(cache.rglob(f"*.{suffix}"))


def full(cache_file: IndexDataCacheFile, name: str, data: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_code_is_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plus(1, tmp_path)(1) == 2
    assert len(files(cache, "nbi")) == len(files(cache, "nbc")) == 1
    monkeypatch.setattr(IndexDataCacheFile, "_save_data", full)
    again = plus(1, tmp_path)
    assert again(1) == 2
    assert sum(again.stats.cache_hits.values()) == 1  # type: ignore[attr-defined]


def test_a_full_disk_leaves_no_older_code_in_the_index(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index can be written still, and names a file that holds code of the source as it was."""
    assert plus(1, tmp_path)(1) == 2
    monkeypatch.setattr(IndexDataCacheFile, "_save_data", full)
    assert plus(5, tmp_path)(1) == 6
    assert plus(5, tmp_path)(1) == 6
    assert files(cache, "nbi") == []


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95"])
def test_damaged_files_are_written_anew(cache: Path, tmp_path: Path, suffix: str, content: bytes) -> None:
    assert plus(1, tmp_path)(1) == 2
    (file,) = files(cache, suffix)
    file.write_bytes(content)
    for _ in range(3):  # without an index, which is removed first, then with a new one
        again = plus(1, tmp_path)
        assert again(1) == 2
    assert sum(again.stats.cache_hits.values()) == 1  # type: ignore[attr-defined]


def test_a_cache_that_may_not_be_read(cache: Path, tmp_path: Path) -> None:
    assert plus(1, tmp_path)(1) == 2
    (index,) = files(cache, "nbi")
    index.unlink()
    index.mkdir()  # root may read any file
    assert plus(1, tmp_path)(1) == 2


def test_no_place_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FunctionCache._impl_class, "_locator_classes", [])
    assert plus(1, tmp_path)(1) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source.py"]


def test_all_that_is_cached_is_compiled_so() -> None:
    sources = [
        path for folder in ("exflow", "placement", "profiling") for path in (ROOT / folder).rglob("*.py")
    ]
    assert [path.name for path in sources if "cache=True" in path.read_text(encoding="utf-8")] == []
