"""TraceWriter: a stop at any moment leaves a readable trace, and nothing but a trace is overwritten."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.profiling import writer as writer_module
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.shard import Rows
from exflow.profiling.trace import RoutingTrace
from exflow.profiling.writer import TraceWriter

LAYOUT = RoutingLayout(model="tiny", num_hidden_layers=1, moe_layer_ids=(0,), num_experts=256, top_k=1)


def rows(*ids: int) -> Rows:
    """Tokens of one expert each; position = id keeps them in order."""
    return {
        "experts": np.array(ids, np.uint8).reshape(-1, 1, 1),
        "sequence": np.zeros(len(ids), np.int32),
        "position": np.array(ids, np.int32),
        "phase": np.ones(len(ids), np.uint8),
    }


def write(path: Path, shard_tokens: int = 2) -> TraceWriter:
    return TraceWriter(path, LAYOUT, has_weights=False, shard_tokens=shard_tokens)


def ids_at(path: Path) -> list[int]:
    ids: list[int] = RoutingTrace.load(path).experts.ravel().tolist()
    return ids


def files_at(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_blocks_of_any_size_become_shards_of_one_size(tmp_path: Path) -> None:
    with write(tmp_path / "t", shard_tokens=4) as writer:
        writer.append(rows(0))
        writer.append(rows(1, 2, 3, 4, 5, 6, 7, 8))
        writer.append(rows())
        writer.append(rows(9))
    index = json.loads((tmp_path / "t/index.json").read_text(encoding="utf-8"))
    assert [shard["num_tokens"] for shard in index["shards"]] == [4, 4, 2]
    assert ids_at(tmp_path / "t") == list(range(10))


def test_complete_shards_are_readable_while_writing(tmp_path: Path) -> None:
    """Read what a killed process leaves: the writer is never closed here."""
    writer = write(tmp_path / "t")
    with pytest.raises(InputError, match="the trace holds no tokens"):
        RoutingTrace.load(tmp_path / "t")
    writer.append(rows(0, 1, 2))
    assert ids_at(tmp_path / "t") == [0, 1]
    writer.append(rows(3, 4))
    assert ids_at(tmp_path / "t") == [0, 1, 2, 3]


def test_an_exception_in_the_block_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), write(tmp_path / "t") as writer:
        writer.append(rows(0, 1, 2))
        raise RuntimeError("stop")
    assert ids_at(tmp_path / "t") == [0, 1, 2]


def test_rows_out_of_range_are_not_appended(tmp_path: Path) -> None:
    layout = replace(LAYOUT, num_hidden_layers=2, moe_layer_ids=(0, 1), experts_per_layer=(256, 7))
    with TraceWriter(tmp_path / "t", layout, has_weights=False) as writer:
        good = rows(255) | {"experts": np.array([[[255], [6]]], np.uint8)}
        writer.append(good)
        with pytest.raises(InputError, match="t: experts: holds 7 in MoE layer 1; values there must be from"):
            writer.append(good | {"experts": np.array([[[255], [7]]], np.uint8)})
        with pytest.raises(InputError, match="t: phase: holds 2; values must be from 0 to 1"):
            writer.append(good | {"phase": np.array([2], np.uint8)})
    assert ids_at(tmp_path / "t") == [255, 6]


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(path: Path, rows: Rows) -> None:
        raise InputError(f"{path}: cannot be written (No space left on device); choose another place")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_shard", fail)
        yield


def test_an_old_trace_stays_until_the_new_one_has_a_shard(tmp_path: Path) -> None:
    with write(tmp_path / "t") as writer:
        writer.append(rows(0, 1, 2))
    writer = write(tmp_path / "t")
    writer.append(rows(7))
    assert ids_at(tmp_path / "t") == [0, 1, 2]
    writer.append(rows(8))
    assert ids_at(tmp_path / "t") == [7, 8]
    assert files_at(tmp_path / "t") == ["index.json", "shard-00002.safetensors"]


class Stop(BaseException):
    """Exception that stands for a signal's."""


def stop_before(line: int) -> Callable[..., Any]:
    """A trace function that raises before so many lines of the writer have been run."""
    left = line

    def local(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise Stop
        return local

    return lambda frame, event, argument: (
        local if frame.f_code.co_filename == writer_module.__file__ else None
    )


@pytest.mark.parametrize("resume", [False, True])
def test_stopped_before_any_line_it_is_the_old_trace_or_the_new_one_so_far(
    tmp_path: Path, resume: bool
) -> None:
    new, seen, before = [10, 11, 12, 13, 14], set(), sys.gettrace()
    for line in count(1):
        folder = tmp_path / str(line)
        with write(folder) as writer:
            writer.append(rows(1, 2, 3))
        writer = TraceWriter(folder, LAYOUT, has_weights=False, shard_tokens=2, resume=resume)
        with suppress(Stop), writer:
            sys.settrace(stop_before(line))
            try:
                writer.append(rows(*new[:1]))
                writer.append(rows(*new[1:]))
            finally:
                stopped = sys.gettrace() is None
                sys.settrace(before)
        found = ids_at(folder)
        seen.add(tuple(found))
        assert found in ([1, 2, 3], new[: len(found)])
        if not stopped:
            break
    assert {(1, 2, 3), tuple(new)} <= seen


def test_an_old_trace_survives_a_full_disk(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with write(tmp_path / "t") as writer:
        writer.append(rows(0, 1, 2))
    request.getfixturevalue("broken_disk")
    with pytest.raises(InputError, match="No space left on device"), write(tmp_path / "t") as writer:
        writer.append(rows(7, 8))
    assert ids_at(tmp_path / "t") == [0, 1, 2]


def test_a_trace_can_be_saved_over_itself(tmp_path: Path) -> None:
    with write(tmp_path / "t") as writer:
        writer.append(rows(0, 1))
    mapped = RoutingTrace.load(tmp_path / "t")
    mapped.save(tmp_path / "t", shard_tokens=1)
    assert ids_at(tmp_path / "t") == [0, 1] == mapped.experts.ravel().tolist()
    assert files_at(tmp_path / "t") == [
        "index.json",
        "shard-00001.safetensors",
        "shard-00002.safetensors",
    ]


def test_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    with write(tmp_path / "t") as writer:
        writer.append(rows(0, 1))
    for name in (".shard-00001.safetensors.x1", ".index.json.x2", "shard-00007.safetensors"):
        (tmp_path / "t" / name).write_bytes(b"half")
    (tmp_path / "t/notes.txt").write_text("mine")
    assert ids_at(tmp_path / "t") == [0, 1]
    with write(tmp_path / "t") as writer:
        writer.append(rows(2))
    assert ids_at(tmp_path / "t") == [2]
    assert files_at(tmp_path / "t") == ["index.json", "notes.txt", "shard-00008.safetensors"]


def test_an_empty_recording_does_not_pass_for_the_old_trace(tmp_path: Path) -> None:
    with write(tmp_path / "t") as writer:
        writer.append(rows(0))
    write(tmp_path / "t").close()
    with pytest.raises(InputError, match="the trace holds no tokens; record it again"):
        RoutingTrace.load(tmp_path / "t")


def test_only_a_trace_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty").close()

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_bytes(b"meow")
    (tmp_path / "web").mkdir()
    (tmp_path / "web/index.json").write_text('{"format": "website"}')
    for name in ("photos", "web"):
        before = files_at(tmp_path / name)
        message = f"{name}: is a folder that holds something other than a trace; choose another place"
        with pytest.raises(InputError, match=message):
            write(tmp_path / name)
        assert files_at(tmp_path / name) == before

    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file: is a file, and a trace is a folder; choose another place"):
        write(tmp_path / "file")


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/t/index\.json: cannot be written"):
        write(tmp_path / "file/t")


def test_shard_tokens_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shard_tokens: is 0; give 1 or more"):
        write(tmp_path / "t", shard_tokens=0)
