"""Gaps in recordings: an import leaves them out, keeps the rest in place, and tells the count once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from exflow.errors import InputError
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.registry import import_trace, read_trace
from exflow.profiling.trace import RoutingTrace
from tests.profiling.responses import (
    EXPERTS,
    GOOD,
    HINTS,
    IDS,
    TOP_K,
    Ids,
    assert_rows,
    lists,
    megatron,
    npy,
    raw,
    sglang,
    told,
    vllm,
    whole,
    written,
)

# Tokens that were not captured.

NOT, PART = "tokens whose routing was not captured", "tokens whose routing was captured in part"


def marked(*places: Any, dtype: Any = np.int16, mark: int = -1) -> Ids:
    """The whole array with the mark in these places of the MoE layers."""
    ids = IDS[:-1].copy().astype(dtype)
    for place in places:
        ids[place] = mark
    array = whole(ids, dtype)
    lost = (ids == np.array(mark).astype(dtype)).all(axis=(1, 2))
    array[lost] = mark
    return array


GAPS = [  # array, rows that are left, lost, in part
    (marked(slice(4, 6)), [0, 1, 2, 3, 6, 7], 2, 0),
    (marked(0, 1), [2, 3, 4, 5, 6, 7], 2, 0),
    (marked(7), [0, 1, 2, 3, 4, 5, 6], 1, 0),
    (marked((3, 1)), [0, 1, 2, 4, 5, 6, 7], 0, 1),
    (marked((0, 0)), [1, 2, 3, 4, 5, 6, 7], 0, 1),
    (marked((3, 1, 0)), [0, 1, 2, 4, 5, 6, 7], 0, 1),
    (marked((2, slice(None), 1)), [0, 1, 3, 4, 5, 6, 7], 0, 1),
    (marked(2, (5, 2, 1)), [0, 1, 3, 4, 6, 7], 1, 1),
    (marked(2, dtype=np.int8), [0, 1, 3, 4, 5, 6, 7], 1, 0),
    (marked(2, dtype=np.int64), [0, 1, 3, 4, 5, 6, 7], 1, 0),
    (marked(2, dtype=np.uint8, mark=255), [0, 1, 3, 4, 5, 6, 7], 1, 0),
    (marked(2, (4, 1), dtype=np.uint16, mark=65535), [0, 1, 3, 5, 6, 7], 1, 1),
    (marked(2, mark=0), [0, 1, 3, 4, 5, 6, 7], 1, 0),  # as SGLang and vLLM leave it
]


def expected_notes(lost: int, in_part: int) -> list[str]:
    counts = ((lost, NOT), (in_part, PART))
    return [f"left out {count} {what}" for count, what in counts if count]


@pytest.mark.parametrize(("array", "rows", "lost", "in_part"), GAPS)
@pytest.mark.parametrize("form", ["npy text", "lists", "raw", "npy file", "dense -1"])
def test_gaps_of_responses(
    array: Ids,
    rows: list[int],
    lost: int,
    in_part: int,
    form: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if form == "raw" and array.dtype.kind == "u":
        array = array.view(f"i{array.dtype.itemsize}")
    if form == "dense -1":
        array = array.copy()
        array[:, 0] = np.array(-1).astype(array.dtype)
    path = tmp_path / "a"
    if form == "npy file":
        np.save(tmp_path / "a.npy", array)
        path = tmp_path / "a.npy"
    else:
        value = {"lists": lists, "raw": raw}.get(form, npy)(array)
        written(path, sglang(value) if form == "raw" else vllm(value))
    if form == "lists" and array.dtype.kind == "u":
        pytest.skip("a list has no type that a mark could be the largest of")
    trace = read_trace([path], hints=HINTS)
    assert_rows(trace, IDS[rows], position=rows)
    assert trace.moe_layer_ids == (1, 2, 3)
    assert told(caplog) == expected_notes(lost, in_part)


@pytest.mark.parametrize(("places", "rows", "lost", "in_part"), [
    ([slice(4, 6)], [0, 1, 2, 3, 6, 7], 2, 0),
    ([(3, 1)], [0, 1, 2, 4, 5, 6, 7], 0, 1),
    ([0, (3, 1, 0)], [1, 2, 4, 5, 6, 7], 1, 1),
])  # fmt: skip
@pytest.mark.parametrize("format", ["npz", "npy", "trtllm", "megatron", "sglang"])
def test_gaps_of_other_formats(
    format: str,
    places: list[Any],
    rows: list[int],
    lost: int,
    in_part: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids = IDS[:-1].copy()
    for place in places:
        ids[place] = -1
    path, position, sequence = tmp_path / "a_0", rows, [0] * len(rows)
    if format == "npz":
        weights = np.where(ids < 0, np.nan, ids / 8)
        np.savez(tmp_path / "a.npz", experts=ids, weights=weights)
        path = tmp_path / "a.npz"
    elif format == "npy":
        ids = ids[:, :, :1]
        np.save(tmp_path / "a.npy", ids[:, :, 0])
        path = tmp_path / "a.npy"
        if 0 in places:  # of a top-1 router a layer's first choice is all
            rows, position, sequence, in_part = rows, rows, sequence, in_part
    elif format == "trtllm":
        path.write_bytes(save({f"7_{layer}": np.ascontiguousarray(ids[:, layer]) for layer in range(3)}))
        position, sequence = [0] * len(rows), rows
    elif format == "megatron":
        written(path, *megatron(0, ids))
        position, sequence = [0] * len(rows), rows
    else:
        path = tmp_path / "a_0.pt"
        buffer = np.full((3, len(ids), 8), -1, np.int32)
        buffer[:, :, :TOP_K] = ids.transpose(1, 0, 2)
        record = {"forward_pass_id": 1, "global_physical_count": torch.zeros(1), "forward_mode": 1}
        record |= {"positions": list(range(len(ids))), "extend_seq_lens": [len(ids)]}
        slots = torch.arange(EXPERTS).expand(3, -1).contiguous()
        record["topk_ids_of_layer"] = torch.from_numpy(buffer)
        torch.save({"records": [record], "last_physical_to_logical_map": slots}, path)
    trace = read_trace([path], hints=Hints(num_experts=EXPERTS))
    np.testing.assert_array_equal(trace.experts, IDS[rows][:, :, : ids.shape[2]])
    assert (trace.position.tolist(), trace.sequence.tolist()) == (position, sequence)
    if format == "npz":
        np.testing.assert_array_equal(trace.weights, IDS[rows] / 8)
    assert told(caplog) == expected_notes(lost, in_part)


def test_responses_without_a_captured_token_take_no_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = vllm(npy(marked(slice(None))))
    path = written(tmp_path / "a", lost, GOOD, lost, GOOD)
    done = import_trace([path], tmp_path / "t", None, Hints(), lambda done, total: None)
    trace = RoutingTrace.load(tmp_path / "t")
    assert_rows(trace, np.concatenate([IDS[:-1]] * 2), [*range(8)] * 2, [0] * 8 + [1] * 8)
    assert done.num_sequences == 2
    assert told(caplog)[1:] == ["left out 16 tokens whose routing was not captured"]  # once, in two passes


def test_decoding_requests_are_followed_over_a_gap(tmp_path: Path) -> None:
    """A recorder's pass of which a token has -1 in one layer: the request goes on in its sequence."""
    records = []
    for number in range(3):
        buffer = np.full((3, 1, 8), -1, np.int32)
        buffer[:, :, :TOP_K] = IDS[number : number + 1].transpose(1, 0, 2)
        if number == 1:
            buffer[2] = -1
        record = {"forward_pass_id": number, "global_physical_count": torch.zeros(1), "forward_mode": 2}
        record |= {"positions": [number], "topk_ids_of_layer": torch.from_numpy(buffer)}
        records.append(record)
    slots = torch.arange(EXPERTS).expand(3, -1).contiguous()
    torch.save({"records": records, "last_physical_to_logical_map": slots}, tmp_path / "a_0.pt")
    assert_rows(read_trace([tmp_path / "a_0.pt"]), IDS[[0, 2]], position=[0, 2])


@pytest.mark.parametrize("value", [-2, -32768])
def test_other_negative_numbers_are_no_mark(value: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a", vllm(npy(marked(3, mark=value))))
    with pytest.raises(InputError, match=f"a: experts: holds {value}; ids start at 0"):
        read_trace([path], hints=HINTS)
    np.savez(tmp_path / "a.npz", experts=np.where(IDS == 3, value, IDS))
    with pytest.raises(InputError, match=f"experts: holds {value}; ids start at 0"):
        read_trace([tmp_path / "a.npz"])
