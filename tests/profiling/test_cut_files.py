"""Cut and empty files: a Megatron log that ends anywhere, and files without a byte."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from exflow.errors import InputError
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.registry import FORMATS, read_trace
from tests.profiling.responses import (
    EXPERTS,
    HIDDEN,
    HINTS,
    IDS,
    Ids,
    Json,
    megatron,
    npy,
    told,
    vllm,
    whole,
    written,
)

# Files that were cut, and empty ones.


def micro_batches(steps: int, calls: int) -> tuple[list[Json], list[Ids]]:
    """Records as they are written, one micro-batch after the other, and the rows of each call."""
    parts = [np.roll(IDS, shift, axis=0) for shift in range(steps * calls)]
    records = [one for number, part in enumerate(parts) for one in megatron(number // calls, part)]
    return records, parts


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("side", ["end", "beginning"])
def test_a_megatron_file_cut_anywhere(
    calls: int, side: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records, parts = micro_batches(3, calls)
    for cut in range(len(parts) * 3 - 3 * calls):  # of the nine calls or fewer a step is left whole
        caplog.clear()
        left = records[: len(records) - cut] if side == "end" else records[cut:]
        lost = -(-cut // 3)
        kept = parts[: len(parts) - lost] if side == "end" else parts[lost:]
        trace = read_trace([written(tmp_path / "a", *left)], hints=HINTS)
        np.testing.assert_array_equal(trace.experts, np.concatenate(kept))
        assert (trace.moe_layer_ids, trace.num_hidden_layers) == ((0, 1, 2), HIDDEN)
        torn = -cut % 3
        notes = [f"left out {torn} calls of routers in a step that was cut off"] if torn else []
        assert told(caplog) == notes


def test_a_megatron_file_cut_within_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records, parts = micro_batches(2, 1)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a").write_text(text[:-30])
    trace = read_trace([tmp_path / "a"], hints=HINTS)
    np.testing.assert_array_equal(trace.experts, parts[0])
    assert told(caplog) == [
        "left out 1 lines that were cut off",
        "left out 2 calls of routers in a step that was cut off",
    ]


def test_a_cut_file_of_one_rank_among_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole_rank = written(tmp_path / "a", *megatron(0, IDS))
    cut_rank = written(tmp_path / "b", *megatron(0, IDS[::-1])[:2])
    for paths in ([whole_rank, cut_rank], [cut_rank, whole_rank]):
        caplog.clear()
        np.testing.assert_array_equal(read_trace(paths, hints=HINTS).experts, IDS)
        assert told(caplog) == ["left out 2 calls of routers in a step that was cut off"]


def test_a_step_between_others_lacks_no_layer(tmp_path: Path) -> None:
    records, _ = micro_batches(3, 1)
    with pytest.raises(
        InputError, match=r"a: step 1 has 0 calls of layer 2, of other layers up to 1; record it"
    ):
        read_trace([written(tmp_path / "a", *records[:5], *records[6:])], hints=HINTS)


EMPTY_FILES: list[tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = [
    ("megatron", lambda path: path.write_bytes(b""), lambda path: written(path, *megatron(0, IDS))),
    ("megatron", lambda path: path.write_bytes(b"\n \r\n"), lambda path: written(path, *megatron(0, IDS))),
    ("responses", lambda path: path.write_bytes(b""), lambda path: written(path, vllm(npy(whole(IDS))))),
    (
        "responses",
        lambda path: path.write_bytes(codecs.BOM_UTF8),
        lambda path: written(path, vllm(npy(whole(IDS)))),
    ),
    ("npz", lambda path: path.write_bytes(b""), lambda path: np.savez(path, experts=IDS)),
    ("npy", lambda path: path.write_bytes(b""), lambda path: np.save(path, IDS)),
    (
        "trtllm",
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(save({"1_0": IDS[:, 0].copy()})),
    ),
    ("npz", lambda path: np.savez(path, experts=IDS[:0]), lambda path: np.savez(path, experts=IDS)),
    ("npy", lambda path: np.save(path, IDS[:0]), lambda path: np.save(path, IDS)),
]


@pytest.mark.parametrize(("format", "write_empty", "write"), EMPTY_FILES)
@pytest.mark.parametrize("given", [True, False])
def test_an_empty_file_among_others(
    format: str,
    write_empty: Callable[[Path], Any],
    write: Callable[[Path], Any],
    given: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert format in FORMATS
    empty, full = (tmp_path / f"{name}.{format if format[:2] == 'np' else 'x'}" for name in "ef")
    write_empty(empty)
    write(full)
    for paths in ([empty, full], [full, empty]):
        caplog.clear()
        trace = read_trace(paths, format if given else None, Hints(num_experts=EXPERTS))
        assert trace.num_tokens == len(IDS)
        assert trace.sequence.min() == 0
        assert told(caplog) == [
            f"left out 1 {'empty files' if empty.stat().st_size < 9 else 'files without tokens'}"
        ]
    with pytest.raises(
        InputError, match=rf"{empty.name}: (is empty|experts: shape is \(0, 3, 2\))"
    ) as caught:
        read_trace([empty, empty], format if given else None)
    assert str(caught.value).startswith(str(empty))
