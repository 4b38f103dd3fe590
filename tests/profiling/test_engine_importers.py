"""Other engines' recordings as traces: what was recorded comes back, and what is damaged gets one line.

The golden files were written by the engines' own code (tests/interop/test_trace_engines.py).
"""

import base64
import io
import itertools
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from exflow import cli
from exflow.commands.import_trace import layer_numbers
from exflow.errors import InputError
from exflow.profiling.importers import json_values
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.passes import SeenPasses
from exflow.profiling.importers.registry import FORMATS, import_trace, read_trace
from exflow.profiling.importers.requests import RequestTracker
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace

GOLDEN = Path(__file__).parent / "golden"
LAYERS, HIDDEN, EXPERTS = (1, 3), 4, 8
GOLDEN_IDS = [[[2, 4], [6, 2]], [[3, 2], [5, 4]], [[2, 1], [4, 7]]]  # of the first three tokens
Ids = npt.NDArray[np.int64]


# Writers of the formats, for rows [tokens, MoE layers, top_k] of the hidden layers LAYERS.


def all_layers(ids: Ids, fill: int, dtype: Any) -> npt.NDArray[Any]:
    """[tokens, HIDDEN, top_k]: the dense layers filled."""
    whole = np.full((len(ids), HIDDEN, ids.shape[2]), fill, dtype)
    whole[:, list(LAYERS)] = ids
    return whole


def npy_text(array: npt.NDArray[Any]) -> str:
    with io.BytesIO() as file:
        np.save(file, array)
        return base64.b64encode(file.getvalue()).decode()


def vllm_response(ids: Ids, prompt: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt}
    text = npy_text(all_layers(ids, 0, np.uint8))
    return {"choices": [{"index": 0, "routed_experts": text}], "usage": usage}


def sglang_response(ids: Ids, prompt: int) -> dict[str, Any]:
    text = base64.b64encode(all_layers(ids, 0, np.int32).tobytes()).decode()
    meta = {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt, "routed_experts": text}
    return {"text": "", "meta_info": meta}


def record(number: int, ids: Ids, slots: npt.NDArray[Any], positions: list[int], **more: Any) -> Any:
    """A forward pass of SGLang's recorder; each expert is in the first of its slots."""
    physical = np.array([[row.tolist().index(expert) for expert in range(EXPERTS)] for row in slots])
    buffer = np.full((HIDDEN, len(ids), 8), -1, np.int32)
    for column, layer in enumerate(LAYERS):
        buffer[layer, :, : ids.shape[2]] = physical[layer][ids[:, column]]
    fields = {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(len(ids))),
        "positions": positions,
        "extend_seq_lens": None,
        "forward_mode": 2,
        "topk_ids_of_layer": torch.from_numpy(buffer),
        "misc_objects": [],
        "global_physical_count": torch.zeros(HIDDEN, slots.shape[1], dtype=torch.int32),
    }
    return fields | more


SLOTS = np.stack([np.roll(np.arange(EXPERTS + 2) % EXPERTS, layer) for layer in range(HIDDEN)])


def dump(path: Path, records: list[Any], slots: npt.NDArray[Any] = SLOTS) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(slots)}, path)
    return path


def trtllm_file(path: Path, iterations: dict[int, Ids]) -> Path:
    tensors = {
        f"{number}_{layer}": np.ascontiguousarray(ids[:, column], np.int32)
        for number, ids in iterations.items()
        for column, layer in enumerate(LAYERS)
    }
    path.write_bytes(save(tensors))
    return path


def megatron_lines(step: int, ids: Ids, **more: Any) -> list[dict[str, Any]]:
    shape = {"num_tokens": len(ids), "topk": ids.shape[2]}
    return [
        {"step": step, "block": "decoder", "layer": layer, "rank": 0, **shape}
        | {"top_indices": ids[:, column].tolist(), **more}
        for column, layer in enumerate(LAYERS)
    ]


def lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@st.composite
def routings(draw: st.DrawFn, parts: int = 3) -> list[Ids]:
    """Up to `parts` arrays of ids, of distinct experts for each token and layer."""
    top_k, rng = draw(st.integers(2, 4)), np.random.default_rng(draw(st.integers(0, 99)))
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=parts))
    return [
        np.array([[rng.permutation(EXPERTS)[:top_k] for _ in LAYERS] for _ in range(size)]) for size in sizes
    ]


IDS = np.array([[[0, 3], [2, 1]], [[1, 0], [3, 2]], [[2, 3], [0, 1]], [[0, 1], [1, 2]]])
HINTS = Hints(num_experts=EXPERTS, hidden_layers=HIDDEN)
SHAPE = Hints(num_experts=EXPERTS, hidden_layers=HIDDEN, top_k=2)


def assert_holds(trace: RoutingTrace, parts: list[Ids]) -> None:
    np.testing.assert_array_equal(trace.experts, np.concatenate(parts))
    assert (trace.moe_layer_ids, trace.num_hidden_layers, trace.num_experts) == (LAYERS, HIDDEN, EXPERTS)


# Golden files.


@pytest.mark.parametrize(
    ("names", "hints", "first"),
    [
        (["expert_distribution_recorder_2_1.pt", "expert_distribution_recorder_1_0.pt"], Hints(), 0),
        (["sglang.json"], SHAPE, 2),
        (["vllm.json"], HINTS, 0),
        (["routed_experts.npy"], HINTS, 0),
        (["trtllm/rank0_raw.safetensors", "trtllm/rank1_raw.safetensors"], Hints(hidden_layers=HIDDEN), 0),
        (["router_trace_rank0.jsonl"], HINTS, 0),
    ],
)
def test_golden_files_by_their_content(names: list[str], hints: Hints, first: int) -> None:
    trace = read_trace([GOLDEN / name for name in names], hints=hints)
    expected = np.array(GOLDEN_IDS)[first:]
    if names[0].startswith("router"):
        expected = np.array(GOLDEN_IDS)
        expected[:, 0].sort(axis=1)
    assert trace.experts[: len(expected)].tolist() == expected.tolist()
    assert_holds(trace, [trace.experts])
    assert trace.num_tokens == 9 - first


def test_golden_recorder_knows_requests() -> None:
    trace = read_trace(sorted(GOLDEN.glob("*.pt")))
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4]
    assert trace.phase.tolist() == [PREFILL] * 7 + [DECODE] * 2


# Laws: what was written comes back.

LAW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LAW
@given(parts=routings(), data=st.data())
def test_responses_come_back(parts: list[Ids], data: st.DataObject, tmp_path: Path) -> None:
    write = data.draw(st.sampled_from([vllm_response, sglang_response]))
    prompts = [data.draw(st.integers(0, len(ids))) for ids in parts]
    values = [write(ids, prompt) for ids, prompt in zip(parts, prompts, strict=True)]
    one_line, path = data.draw(st.booleans()), tmp_path / "a.json"
    path.write_text(json.dumps(values, indent=1)) if one_line else lines(path, values)
    trace = read_trace([path], hints=Hints(EXPERTS, None, HIDDEN, parts[0].shape[2]))
    assert_holds(trace, parts)
    assert trace.sequence.tolist() == [n for n, ids in enumerate(parts) for _ in ids]
    assert trace.position.tolist() == [p for ids in parts for p in range(len(ids))]
    boundary = np.array(prompts)[trace.sequence]
    assert trace.phase.tolist() == np.where(trace.position < boundary, PREFILL, DECODE).tolist()


@LAW
@given(parts=routings())
def test_arrays_of_vllm_come_back(parts: list[Ids], tmp_path: Path) -> None:
    paths = []
    for number, ids in enumerate(parts):
        paths.append(tmp_path / f"{number}.npy")
        np.save(paths[-1], np.asarray(all_layers(ids, 0, np.uint16), order="CF"[number % 2]))
    trace = read_trace(paths, hints=HINTS)
    assert_holds(trace, parts)
    assert trace.sequence.tolist() == [n for n, ids in enumerate(parts) for _ in ids]


@LAW
@given(parts=routings())
def test_iterations_of_tensorrt_llm_come_back(parts: list[Ids], tmp_path: Path) -> None:
    path = trtllm_file(tmp_path / "rank0_raw.safetensors", {8 + n: ids for n, ids in enumerate(parts)})
    trace = read_trace([path], hints=HINTS)
    assert_holds(trace, parts)
    assert trace.sequence.tolist() == [row for ids in parts for row in range(len(ids))]
    assert trace.position.tolist() == [n for n, ids in enumerate(parts) for _ in ids]


@LAW
@given(parts=routings())
def test_steps_of_megatron_come_back(parts: list[Ids], tmp_path: Path) -> None:
    values = [line for step, ids in enumerate(parts) for line in megatron_lines(step, ids)]
    assert_holds(read_trace([lines(tmp_path / "a.jsonl", values)], hints=HINTS), parts)


@LAW
@given(parts=routings())
def test_passes_of_sglang_come_back(parts: list[Ids], tmp_path: Path) -> None:
    records = []
    for number, ids in enumerate(parts):
        prompt = {"extend_seq_lens": [len(ids)], "forward_mode": 1}
        records.append(record(2 * number, ids, SLOTS, list(range(len(ids))), **prompt))
        records.append(record(2 * number + 1, ids[:1], SLOTS, [len(ids)]))
    trace = read_trace([dump(tmp_path / "a_0.pt", records)])
    assert_holds(trace, [rows for ids in parts for rows in (ids, ids[:1])])
    assert trace.sequence.tolist() == [n for n, ids in enumerate(parts) for _ in range(len(ids) + 1)]


# Several ranks, requests, layers.


def test_ranks_with_the_same_tokens_count_once_and_others_are_joined(tmp_path: Path) -> None:
    same = [trtllm_file(tmp_path / f"rank{rank}_raw.safetensors", {1: IDS, 2: IDS[:2]}) for rank in (0, 1)]
    assert_holds(read_trace(same, hints=HINTS), [IDS, IDS[:2]])
    other = trtllm_file(tmp_path / "rank2_raw.safetensors", {1: IDS[::-1], 2: IDS[:2]})
    trace = read_trace([*same, other], hints=HINTS)
    assert_holds(trace, [IDS, IDS[:2], IDS[::-1]])
    assert trace.sequence.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    lines_of = [lines(tmp_path / f"{rank}.jsonl", megatron_lines(0, IDS)) for rank in (0, 1)]
    assert_holds(read_trace(lines_of, hints=HINTS), [IDS])


def test_a_gathered_batch_that_was_cut_counts_once(tmp_path: Path) -> None:
    """What SGLang's rank 1 records under data parallelism without an all-to-all back end."""
    first = dump(tmp_path / "b_0.pt", [record(1, IDS, SLOTS, [5, 6, 7, 8])])
    second = dump(tmp_path / "a_1.pt", [record(1, IDS[:2], SLOTS, [3, 9])])
    trace = read_trace([second, first])
    assert_holds(trace, [IDS])
    assert trace.position.tolist() == [5, 6, 7, 8]


def test_replicas_of_one_expert_are_one_token(tmp_path: Path) -> None:
    """Tensor-parallel ranks may take different slots of the same expert."""
    one, two = record(1, IDS, SLOTS, [0] * 4), record(1, IDS, SLOTS, [0] * 4)
    slots = two["topk_ids_of_layer"]
    assert SLOTS[1][1] == SLOTS[1][9] == 0
    slots[1][slots[1] == 1] = 9
    trace = read_trace([dump(tmp_path / "a_0.pt", [one]), dump(tmp_path / "a_1.pt", [two])])
    assert_holds(trace, [IDS])


def test_seen_passes_compare_what_both_hold() -> None:
    seen = SeenPasses(num_files=2)
    assert not seen.is_repeated(1, IDS)
    assert seen.is_repeated(1, IDS[:2])
    assert not seen.is_repeated(2, IDS)
    assert not seen.is_repeated(1, IDS[1:])
    assert not seen.is_repeated(3, IDS[:0])
    assert not seen.is_repeated(3, IDS)


def test_requests_are_followed_by_their_positions() -> None:
    tracker = RequestTracker(itertools.count(5))
    assert tracker.follow([(0, 3), (0, 3)]) == [5, 6]
    assert tracker.follow([(3, 1), (0, 2), (3, 1)]) == [5, 7, 6]
    assert tracker.follow([(4, 1), (4, 1)]) == [5, 6]
    assert tracker.follow([(9, 2), (11, 1)]) == [8, 9]  # nothing leads there; not within one pass
    assert tracker.follow([(0, 4), (4, 1)]) == [10, 11]
    assert tracker.follow([(5, 1)]) == [11]  # the one that ran last


def test_mixed_passes_padding_and_idle_ranks(tmp_path: Path) -> None:
    padded = record(2, IDS, SLOTS, [0, 1, 7, 0], extend_seq_lens=[2, 1], forward_mode=3)
    padded["topk_ids_of_layer"][:, 3] = -1
    idle = record(1, IDS[:0], SLOTS, [], forward_mode=4)
    trace = read_trace([dump(tmp_path / "a_0.pt", [idle, padded])])
    assert_holds(trace, [IDS[:3]])
    assert trace.phase.tolist() == [PREFILL, PREFILL, DECODE]
    assert trace.sequence.tolist() == [0, 0, 1]


def test_layers_are_chosen(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [vllm_response(IDS, 2)])
    trace = read_trace([path], hints=Hints(EXPERTS, (3,)))
    assert (trace.moe_layer_ids, trace.num_hidden_layers) == ((3,), HIDDEN)
    assert trace.experts.tolist() == IDS[:, 1:].tolist()
    np.savez(tmp_path / "a.npz", experts=IDS, weights=IDS / 8, experts_per_layer=[5, 8])
    trace = read_trace([tmp_path / "a.npz"], hints=Hints(moe_layers=(1,), hidden_layers=9))
    assert (trace.moe_layer_ids, trace.num_hidden_layers, trace.experts_per_layer) == ((1,), 9, (8,))
    assert trace.weights is not None and trace.weights.tolist() == (IDS[:, 1:] / 8).tolist()
    with pytest.raises(InputError, match=r"a\.npz: layer 2 of moe_layers was not recorded, these were: \["):
        read_trace([tmp_path / "a.npz"], hints=Hints(moe_layers=(1, 2)))


def test_layers_of_top_1_are_asked_for(tmp_path: Path) -> None:
    ids = all_layers(IDS[:, :, :1], 0, np.uint8)
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(
        InputError, match=r"a\.npy: layer 0 holds expert 0 for every token, which a dense lay"
    ):
        read_trace([tmp_path / "a.npy"])
    trace = read_trace([tmp_path / "a.npy"], hints=Hints(EXPERTS, LAYERS))
    assert_holds(trace, [IDS[:, :, :1]])
    np.save(tmp_path / "b.npy", ids[:, list(LAYERS)])
    assert read_trace([tmp_path / "b.npy"]).moe_layer_ids == (0, 1)


def test_what_was_not_captured_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    response = vllm_response(np.concatenate([IDS[:2] * 0, IDS]), 4)
    path = lines(tmp_path / "a.jsonl", [{"routed_experts": None}, response])
    trace = read_trace([path], hints=HINTS)
    assert_holds(trace, [IDS])
    assert trace.position.tolist() == [2, 3, 4, 5]
    assert "left out 2 tokens whose routing was not captured" in caplog.text
    assert "left out 1 responses without routing (the first: " in caplog.text


def test_every_place_of_a_response(tmp_path: Path) -> None:
    text = npy_text(all_layers(IDS, 0, np.uint8))
    counts = {"prompt_tokens": 3, "completion_tokens": 4}  # 7 tokens: the rows begin at position 2
    for value, positions in (
        ({"routed_experts": text}, [0, 1, 2, 3]),
        ({"sglext": {"routed_experts": text}, "choices": [{}], "usage": counts}, [2, 3, 4, 5]),
        ({"choices": [{"meta_info": {"routed_experts": text} | counts}, {}]}, [2, 3, 4, 5]),
        ({"choices": [{"routed_experts": text}], "usage": counts}, [2, 3, 4, 5]),
        ({"choices": [{"routed_experts": text}, {}], "usage": counts}, [0, 1, 2, 3]),
        ({"choices": [{"routed_experts": text}], "usage": counts | {"prompt_tokens": 0}}, [0, 1, 2, 3]),
    ):
        trace = read_trace([lines(tmp_path / "a.jsonl", [value])], hints=HINTS)
        assert_holds(trace, [IDS])
        assert trace.position.tolist() == positions


# What is wrong with a file, and what the error says.

Make = Callable[[Path], Path]


def json_file(*values: Any) -> Make:
    return lambda path: lines(path, list(values))


def raw(content: bytes) -> Make:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def vllm_text(text: Any) -> Make:
    return json_file({"choices": [{"routed_experts": text}]})


def pt(*records: Any, **top: Any) -> Make:
    def make(path: Path) -> Path:
        whole = {"records": list(records), "last_physical_to_logical_map": torch.from_numpy(SLOTS)} | top
        torch.save({name: value for name, value in whole.items() if value is not None}, path)
        return path

    return make


def one(**more: Any) -> Any:
    return record(1, IDS, SLOTS, [0, 1, 2, 3]) | more


def ids_tensor(change: Callable[[Any], Any]) -> Any:
    fields = one()
    changed = change(fields["topk_ids_of_layer"])
    return fields | ({} if changed is None else {"topk_ids_of_layer": changed})


def set_at(*place: int, to: int) -> Callable[[Any], None]:
    return lambda tensor: tensor.__setitem__(place, to)


def tensors_file(header: Any, data: bytes = b"") -> Make:
    text = json.dumps(header).encode()
    return raw(struct.pack("<Q", len(text)) + text + data)


def tensor(shape: list[int], begin: int, end: int, dtype: str = "I32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    with io.BytesIO() as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue()


STEP = megatron_lines(0, IDS)

MALFORMED = [
    ("responses", raw(b'{"a": 1}\n{"b": '), r"line 1: holds no routed_experts; start the server with --ena"),
    (
        "responses",
        raw(b'{"routed_experts": null}\n{"b": \n'),
        r"line 2 is not valid JSON \(.*\); give the file",
    ),
    ("responses", raw(b'{"routed'), r"line 1 is not valid JSON"),
    ("responses", raw(b"[" * 100_000), r"line 1 is not valid JSON \(nested too deeply\)"),
    ("responses", raw(b'{\n"a": [1,\n2}'), r"the file is not valid JSON"),
    ("responses", raw(b'{"a": "\xff"}\n'), r"line 1 is not valid JSON"),
    ("responses", raw(b'\n{\n"a": [1,\n2}'), r"the file is not valid JSON"),
    ("responses", json_file(7), r"line 1: is 7; give the JSON object of a response"),
    ("responses", json_file([7, {"routed_experts": None}]), r"line 1\[0\]: is 7; give"),
    (
        "responses",
        json_file({"routed_experts": None}),
        r"holds routed_experts without a row \(aborted\?\); left",
    ),
    ("responses", vllm_text(7), r"line 1: routed_experts: is 7; give the base64 text"),
    ("responses", vllm_text("AAA"), r"line 1: routed_experts: is not base64 \(.*\); give the text"),
    ("responses", vllm_text("é"), r"line 1: routed_experts: is not base64"),
    ("responses", vllm_text("AAAA"), r"is SGLang's, which says no shape; give hidden_layers and top_k"),
    ("responses", vllm_text(npy_text(IDS)[:40]), r"is no \.npy file \(.*\); give the response whole"),
    ("responses", vllm_text(npy_text(IDS * 1.0)), r"is float64 \(4, 2, 2\); give integers \[tokens, hidden"),
    ("responses", vllm_text(npy_text(IDS[0])), r"is int64 \(2, 2\); give integers \[tokens, hidden"),
    ("responses", vllm_text(npy_text(np.array([None]))), r"is no \.npy file \(the array holds Python objec"),
    (
        "responses",
        vllm_text(base64.b64encode(npy_header((10**9, 27, 4))).decode()),
        r"is no \.npy file \(the header declares 108000000000 bytes of data, there are 0\)",
    ),
    ("responses", vllm_text(npy_text(IDS - 2)), r"experts: holds -2; ids start at 0"),
    (
        "responses",
        json_file(vllm_response(IDS, 1), vllm_response(IDS[:, :, :1].repeat(3, 2) + 1, 1)),
        r"has 2 layers and top 3, .* has 2 and 2; join files of one model",
    ),
    (
        "responses",
        vllm_text(npy_text(np.array([[[0, 0], [1, 2]], [[1, 2], [0, 0]]]))),
        r"layer 0 holds no routing of token 0, other layers do; record it again, or give moe_layers",
    ),
    (
        "responses",
        json_file(vllm_response(IDS, 1), {"routed_experts": npy_text(np.full((1, 4, 2), [1, 2]))}),
        r"layer 0 routes here, and not in the rows before; import models one by one",
    ),
    (
        "responses",
        json_file(vllm_response(IDS, 1), {"routed_experts": npy_text(np.full((1, 2, 2), [1, 2]))}),
        r"has 2 layers, layer 3 is not among them; give moe_layers below",
    ),
    (
        "responses",
        json_file(
            {
                "meta_info": {"prompt_tokens": 1, "completion_tokens": 1}
                | {"routed_experts": npy_text(all_layers(IDS, 0, np.uint8))}
            }
        ),
        r"has rows for 4 tokens, the response has 2; give the right hidden_layers and top_k",
    ),
    (
        "responses",
        json_file(
            {
                "meta_info": {"prompt_tokens": 10**30, "completion_tokens": 1}
                | {"routed_experts": npy_text(all_layers(IDS, 0, np.uint8))}
            }
        ),
        r"line 1: counts 10{29}1 tokens; give the response whole",
    ),
    ("npy", raw(npy_header((10**9, 27, 4))), r"cannot be read \(the header declares 108000000000 bytes of"),
    ("npy", raw(npy_header((-4, -2))), r"cannot be read \(the header declares the shape \(-4, -2\)\); give"),
    ("npy", raw(b"\x93NUMPY\x09\x00"), r"cannot be read \(.*version.*\); give an \.npy"),
    (
        "trtllm",
        raw(b"\xff" * 8 + b"{"),
        r"is truncated \(9 bytes end inside the header\); give the rank\*_raw",
    ),
    ("trtllm", raw(struct.pack("<Q", 2) + b"{]"), r"the header is not JSON"),
    ("trtllm", raw(struct.pack("<Q", 2) + b"[]"), r"the header is not a JSON object"),
    ("trtllm", tensors_file({}), r"holds no routing of any token"),
    (
        "trtllm",
        tensors_file({"a": tensor([0, 2], 0, 0)}),
        r"holds 'a', not iteration_layer; give the rank\*_",
    ),
    ("trtllm", tensors_file({"1_2": 3}), r"entry for '1_2' is no tensor of integers"),
    ("trtllm", tensors_file({"1_2": tensor([1, 2], 0, 8, "F32")}, bytes(8)), r"no tensor of integers \('F32"),
    (
        "trtllm",
        tensors_file({"1_2": tensor([10**9, 25], 0, 10**11)}),
        r"'1_2' has the shape \[1000000000, 25\] and the bytes 0 to 100000000000 of 0",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([1, 2], 0, 9)}, bytes(9)),
        r"'1_2' has the shape \[1, 2\] and the",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([1, 2], -8, 0)}, bytes(9)),
        r"'1_2' has the shape \[1, 2\] and the",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([4], 0, 16)}, bytes(16)),
        r"1_2: has the shape \[4\], ids have \[",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([1, 2], 0, 8), "1_3": tensor([2, 2], 8, 24)}, bytes(24)),
        r"iteration 1 has \[2, 2\] ids in layer 3 and \[1, 2\] in layer 2; leave layers out with",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([1, 2], 0, 8), "2_3": tensor([1, 2], 8, 16)}, bytes(16)),
        r"a: holds layers \[3\] after \[2\]; record it again, or give moe_layers with those that are alw",
    ),
    (
        "megatron",
        json_file(STEP[0] | {"step": "0"}),
        r"line 1: step: is '0', not a number from 0 up; give the",
    ),
    ("megatron", json_file([1]), r"line 1\[0\]: step: is None, not a number"),
    (
        "megatron",
        json_file(STEP[0] | {"top_indices": [[1, 2], [3]]}),
        r"top_indices: is \[\[1, 2\], \[3\]\]; 4",
    ),
    (
        "megatron",
        json_file(STEP[0] | {"top_indices": [[0.5, 1]] * 4}),
        r"4 rows of 2 ids are needed to match",
    ),
    ("megatron", json_file(STEP[0] | {"top_indices": "x"}), r"top_indices: is 'x'; 4 rows of 2 ids"),
    (
        "megatron",
        json_file(STEP[0] | {"top_indices": [[1 << 40, 1]] * 4}),
        r"holds 1099511627776, which is no",
    ),
    ("megatron", json_file(STEP[0] | {"num_tokens": 10**12}), r"num_tokens: is 1000000000000, not a number"),
    (
        "megatron",
        json_file(STEP[0] | {"top_indices": [], "topk": 1 << 30}),
        r"top_indices: is \[\]; 4 rows of",
    ),
    ("megatron", json_file(STEP[0] | {"top_indices": [[-2, 1]] * 4}), r"experts: holds -2; ids start at 0"),
    (
        "megatron",
        json_file(STEP[0], megatron_lines(0, IDS[:3])[1]),
        r"step 0 has ids \[\(3, 2\)\] in layer 3 and \[\(4, 2\)\] in layer 1, one call each; give",
    ),
    (
        "sglang",
        pt(logical_count=torch.zeros(2, 4, 8)),
        r"holds loads \(mode stat\), which say nothing of aff",
    ),
    ("sglang", pt(records=None), r"holds .*, no records; give the \.pt files that SGLang's recorder dumped"),
    ("sglang", pt(last_physical_to_logical_map=None), r"has no last_physical_to_logical_map; give the"),
    (
        "sglang",
        pt(last_physical_to_logical_map=[1]),
        r"last_physical_to_logical_map: is \[1\]; a tensor of in",
    ),
    ("sglang", pt(last_physical_to_logical_map=torch.full((4, 8), -1)), r"_logical_map: holds no expert ids"),
    (
        "sglang",
        pt(one(), last_physical_to_logical_map=torch.zeros(3, 8).long()),
        r"has 4 layers, last_physical_to_",
    ),
    ("sglang", pt(), r"holds no routing of any token"),
    ("sglang", pt({"a": 1}), r"records\[0\]: is \{'a': 1\}; give the"),
    (
        "sglang",
        pt({"forward_pass_id": 1, "global_physical_count": torch.zeros(1)}),
        r"records\[0\]: holds loads \(mode per_pass\), which say nothing of affinity; record with",
    ),
    ("sglang", pt(ids_tensor(lambda it: it.float())), r"topk_ids_of_layer: is tensor\(.*; a tensor of integ"),
    ("sglang", pt(ids_tensor(lambda it: it[:, :1].expand(-1, 10**9, -1))), r"a tensor of integers in 3 dim"),
    ("sglang", pt(ids_tensor(lambda it: it.to_sparse())), r"a tensor of integers in 3 dimensions is needed"),
    (
        "sglang",
        pt(ids_tensor(set_at(1, 0, 0, to=10))),
        r"holds slot 10 of 10; record with --disable-shared-e",
    ),
    (
        "sglang",
        pt(ids_tensor(lambda it: it.__setitem__((1, 2, slice(3)), torch.tensor([1, -1, 2])))),
        r"records\[0\]: topk_ids_of_layer: has -1 among the first 2 ids of a token; give",
    ),
    (
        "sglang",
        pt(ids_tensor(lambda it: it.__setitem__(3, -1)), one()),
        r"layer 3 routes here, and not in the rows",
    ),
    ("sglang", pt(one(forward_pass_id=[1])), r"forward_pass_id: is \[1\], no number; give"),
    ("sglang", pt(one(positions=[0, 1])), r"records\[0\]: positions: is \[0, 1\]; 4 integers are needed"),
    ("sglang", pt(one(positions=[0, 1, 2, -3])), r"positions: holds -3 to 2; give"),
    ("sglang", pt(one(positions=[[0], [1, 2]])), r"positions: is \[\[0\], \[1, 2\]\]; 4 integers are needed"),
    (
        "sglang",
        pt(one(forward_mode=5)),
        r"forward_mode: is 5, not extend, decode or mixed; record without spe",
    ),
    ("sglang", pt(one(forward_mode=1)), r"extend_seq_lens: is None; give"),
    ("sglang", pt(one(forward_mode=1, extend_seq_lens=[3, 2])), r"extend_seq_lens: are 5 tokens in all, the"),
    ("sglang", pt(one(forward_mode=1, extend_seq_lens=[3])), r"extend_seq_lens: leave out tokens that were"),
    ("sglang", pt(one(forward_mode=1, extend_seq_lens=[])), r"extend_seq_lens: leave out tokens that were r"),
    (
        "sglang",
        pt(one(forward_mode=1, extend_seq_lens=[4], positions=[0, 1, 3, 2])),
        r"do not ascend by 1 in",
    ),
]


@pytest.mark.parametrize(("format", "make", "message"), MALFORMED)
def test_malformed(format: str, make: Make, message: str, tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(InputError, match=message) as caught:
        read_trace([path], format)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (
            Hints(EXPERTS, None, 3, 2),
            r"has 128 bytes, no multiple of 24 for a token \(int32, 3 layers, top 2\)",
        ),
        (
            Hints(EXPERTS, None, 2, 1),
            r"has rows for 16 tokens, the response has 5; give the right hidden_la",
        ),
        (Hints(2, None, 4, 2), r"experts: holds 3; values must be from 0 to 1"),
        (Hints(EXPERTS, (1, 7), 4, 2), r"has 4 layers, layer 7 is not among them"),
    ],
)
def test_hints_that_do_not_fit(hints: Hints, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [sglang_response(IDS, 2)])
    with pytest.raises(InputError, match=message):
        read_trace([path], hints=hints)
    np.save(tmp_path / "a.npy", all_layers(IDS, 0, np.uint8))
    with pytest.raises(InputError, match=r"has 4 hidden layers, hidden_layers says 9; leave it out"):
        read_trace([tmp_path / "a.npy"], hints=Hints(hidden_layers=9))


def test_meta_info_of_tensorrt_llm(tmp_path: Path) -> None:
    path = trtllm_file(tmp_path / "rank0_raw.safetensors", {1: IDS})
    for content, message in (
        ('{"num_experts": "8"}', r"meta_info\.json: num_experts: is '8'; give an integer"),
        ("{", r"meta_info\.json: the meta_info\.json is not valid JSON"),
        ('{"num_experts": 3}', r"rank0_raw\.safetensors: experts: holds 3; values must be from 0 to 2"),
    ):
        (tmp_path / "meta_info.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read_trace([path])


def test_files_of_two_formats(tmp_path: Path) -> None:
    first = trtllm_file(tmp_path / "rank0_raw.safetensors", {1: IDS})
    second = lines(tmp_path / "a.jsonl", STEP)
    with pytest.raises(InputError, match=r"a\.jsonl: is megatron, .* is trtllm; give files of one recording"):
        read_trace([first, second])


# Files that would harm.


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("kind", ["protocol 0", "protocol 5", "torch", "old torch", "in a record"])
def test_a_pickle_in_disguise(format: str | None, kind: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "exploded", tmp_path / "a_0.pt"
    if kind.startswith("protocol"):
        path.write_bytes(pickle.dumps({"records": Bomb(mark)}, int(kind[-1])))
    elif kind == "in a record":
        dump(path, [one(misc_objects=[Bomb(mark)])])
    else:
        torch.save({"records": Bomb(mark)}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        read_trace([path], format)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_archives_that_unfold(tmp_path: Path) -> None:
    bomb = tmp_path / "a.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        shape = (40_000_000, 2)
        archive.writestr("experts.npy", npy_header(shape) + bytes(shape[0] * shape[1]))
    with pytest.raises(
        InputError, match=r"a\.npz: experts: declares 80000000 bytes in \d+, more than ids com"
    ):
        read_trace([bomb])
    lie = tmp_path / "b.npz"
    with zipfile.ZipFile(lie, "w") as archive:
        archive.writestr("experts.npy", npy_header((10**9, 100)))
    with pytest.raises(
        InputError, match=r"b\.npz: cannot be read \(the header declares 100000000000 bytes of"
    ):
        read_trace([lie])
    whole = dump(tmp_path / "a_0.pt", [one()])
    packed = tmp_path / "b_0.pt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(InputError, match=r"b_0\.pt: cannot be read \(.* is compressed: not of torch\.save\)"):
        read_trace([packed])


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "MAX_BYTES", 100)
    path = lines(tmp_path / "a.jsonl", [{"a": "x" * 200}])
    with pytest.raises(
        InputError, match=r"a\.jsonl: a line has more than 100 bytes; write one response a lin"
    ):
        read_trace([path])
    path.write_text("{\n" + '"a": 1,\n' * 20)
    with pytest.raises(InputError, match=r"a\.jsonl: has more than 100 bytes; write one response a line \(J"):
        read_trace([path])


GOLDEN_FILES = {
    "sglang": "expert_distribution_recorder_1_0.pt",
    "responses": "vllm.json",
    "npy": "routed_experts.npy",
    "trtllm": "trtllm/rank0_raw.safetensors",
    "megatron": "router_trace_rank0.jsonl",
}


@pytest.mark.parametrize("format", GOLDEN_FILES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_input_error_or_another_trace(format: str, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray((GOLDEN / GOLDEN_FILES[format]).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    for name in (format, None):
        try:
            trace = read_trace([path], name, hints=SHAPE)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
        else:
            assert trace.num_tokens


# Writing the trace, and the command.


def test_blocks_are_joined_in_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exflow.profiling.importers.arrays.BLOCK_BYTES", 64)
    monkeypatch.setattr("exflow.profiling.importers.registry._SHARD_TOKENS", 3)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (50, 2, 1)), axis=2)[:, :, :2]
    np.savez_compressed(
        tmp_path / "a.npz",
        experts=ids,
        weights=ids / 8,
        seq=np.arange(50) // 7,
        pos=np.arange(50),
        num_experts=8,
    )
    done: list[tuple[int, int]] = []
    imported = import_trace(
        [tmp_path / "a.npz"], tmp_path / "t", None, Hints(), lambda *place: done.append(place)
    )
    trace = RoutingTrace.load(tmp_path / "t")
    assert trace.digest() == read_trace([tmp_path / "a.npz"]).digest()
    assert (imported.num_tokens, imported.num_sequences, imported.layout) == (50, 8, trace.layout)
    assert len(list((tmp_path / "t").glob("shard-*"))) == 17
    assert len(done) > 10 and done == sorted(done)


def test_an_error_leaves_the_trace_that_was_there(tmp_path: Path) -> None:
    good = lines(tmp_path / "a.jsonl", [vllm_response(IDS, 2)] * 3)
    bad = lines(tmp_path / "b.jsonl", [vllm_response(IDS, 2), {"routed_experts": 7}])
    output = tmp_path / "t"
    import_trace([good], output, None, HINTS, lambda done, total: None)
    before = RoutingTrace.load(output).digest()
    with pytest.raises(InputError, match=r"b\.jsonl: line 2: routed_experts: is 7; give"):
        import_trace([good, bad], output, None, HINTS, lambda done, total: None)
    assert RoutingTrace.load(output).digest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "t"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="holds something other than a trace; choose another place"):
        import_trace([good], tmp_path / "other", None, HINTS, lambda done, total: None)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines(tmp_path / "a.jsonl", [sglang_response(IDS, 2), sglang_response(IDS[:3], 1)])
    line = f"exflow import {path} --hidden-layers 4 --top-k 2 --num-experts 8 --moe-layers 3 --json"
    monkeypatch.setattr(sys, "argv", [*line.split(), "-o", str(tmp_path / "t")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == {
        "trace": str(tmp_path / "t"),
        "model": "",
        "tokens": 7,
        "sequences": 2,
        "moe_layers": 1,
        "experts": 8,
        "top_k": 2,
    }
    assert RoutingTrace.load(tmp_path / "t").moe_layer_ids == (3,)


def test_layer_numbers() -> None:
    assert layer_numbers(None) is None
    assert layer_numbers("5, 0-2,9") == (0, 1, 2, 5, 9)
    for text, message in (
        ("3-1", "'3-1' is no layer or range"),
        ("a", "'a' is no"),
        ("1,1-2", "names"),
    ):
        with pytest.raises(InputError, match=f"--moe-layers {text}: {message}"):
            layer_numbers(text)
