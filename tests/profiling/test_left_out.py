"""What an import leaves out: the rest comes back, position for position, and the count is told once."""

import base64
import codecs
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import save

from exflow.errors import InputError
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.loads import read_loads
from exflow.profiling.importers.registry import FORMATS, import_trace, read_trace
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace

EXPERTS, HIDDEN, TOP_K, PROMPT, TOKENS = 8, 4, 2, 6, 9  # layer 0 is dense; 3 tokens are new
RNG = np.random.default_rng(3)
IDS = np.array([[RNG.permutation(EXPERTS)[:TOP_K] for _ in range(HIDDEN - 1)] for _ in range(TOKENS)])
"""[tokens, MoE layers, top_k]; the last token was sampled and, but for prefills alone, never run."""

HINTS = Hints(num_experts=EXPERTS, hidden_layers=HIDDEN, top_k=TOP_K)
Ids = npt.NDArray[np.integer[Any]]
Json = dict[str, Any]


def whole(ids: Ids, dtype: Any = np.int16, dense: int = 0) -> Ids:
    """[tokens, HIDDEN, top_k], as engines write them that record every layer."""
    return np.concatenate([np.full((len(ids), 1, TOP_K), dense), ids], axis=1).astype(dtype)


def npy(array: Ids) -> str:
    with io.BytesIO() as file:
        np.save(file, array)
        return base64.b64encode(file.getvalue()).decode()


def lists(array: Ids) -> Any:
    return array.tolist()


def raw(array: Ids) -> str:
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


USAGE = {"prompt_tokens": PROMPT, "completion_tokens": TOKENS - PROMPT, "total_tokens": TOKENS}


def vllm(value: Any, **more: Any) -> Json:
    return {"id": "cmpl-1", "choices": [{"index": 0, "routed_experts": value}], "usage": USAGE} | more


def sglang(value: Any, prompt: int = PROMPT, new: int = TOKENS - PROMPT) -> Json:
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "finish_reason": {"type": "length"}}
    return {"text": "", "meta_info": {"routed_experts": value} | counts}


GOOD = vllm(npy(whole(IDS[:-1])))


def written(path: Path, *values: Any) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    return path


def assert_rows(trace: RoutingTrace, ids: Any, position: Any = None, sequence: Any = None) -> None:
    np.testing.assert_array_equal(trace.experts, ids)
    assert trace.position.tolist() == list(range(len(ids)) if position is None else position)
    assert trace.sequence.tolist() == list([0] * len(ids) if sequence is None else sequence)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said, without the places."""
    return [re.sub(r" \(the first: .*", "", record.getMessage()) for record in caplog.records]


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


# Errors among the responses.

ERRORS = "responses that are errors"
NONE = "responses without routing"
TEXT = "lines that are not JSON"
LACKING = [
    (
        {"error": {"message": "busy", "type": "x", "param": None, "code": 503}},
        ERRORS,
        r"is an error \('busy'",
    ),
    ({"error": "busy"}, ERRORS, r"is an error \('busy'\)"),
    ({"error": {"code": 500}}, ERRORS, r"is an error \(\{'code': 500\}\)"),
    ({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}, ERRORS, "too long"),
    ({"object": "error"}, ERRORS, r"is an error \('error'\)"),
    ({"detail": "Not Found"}, ERRORS, "Not Found"),
    ({"detail": [{"loc": ["body"], "msg": "field required"}]}, ERRORS, "field required"),
    ({"errors": ["a"]}, ERRORS, r"\['a'\]"),
    ({"status": 503, "body": {"error": {"message": "busy"}}}, ERRORS, r"is an error \(503\)"),
    ({"status_code": 429, "message": "slow down"}, ERRORS, "slow down"),
    ({"id": "1", "custom_id": "a", "response": None, "error": {"message": "expired"}}, ERRORS, "expired"),
    ({"id": "1", "response": {"status_code": 400, "body": {"message": "no"}}, "error": None}, ERRORS, "400"),
    (None, NONE, r"is None; give the JSON object of a response"),
    ("Internal Server Error", NONE, r"is 'Internal Server Error'; give"),
    (7, NONE, r"is 7; give"),
    ({}, NONE, r"holds no routed_experts; start the server with --enable-return-routed-experts"),
    ({"choices": [], "usage": USAGE}, NONE, "has no choices"),
    ({"choices": None}, NONE, "holds no routed_experts"),
    ({"choices": [{"index": 0, "text": "x"}]}, NONE, "holds no routed_experts; start"),
    (vllm(None), NONE, r"holds routed_experts without a row \(aborted\?\)"),
    (vllm(""), NONE, r"without a row"),
    (vllm([]), NONE, r"without a row"),
    (vllm(None, prompt_routed_experts=None), NONE, r"without a row"),
    (sglang(None), NONE, r"without a row"),
    ({"routed_experts": None}, NONE, r"without a row"),
    ({"text": "", "meta_info": {"finish_reason": {"type": "abort"}}}, NONE, "holds no routed_experts"),
]


@pytest.mark.parametrize(("value", "what", "why"), LACKING)
def test_one_of_many_that_has_no_routing(
    value: Any, what: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """First, between others, as an entry of a list, and as a file of its own."""
    for paths in (
        [written(tmp_path / "first", value, GOOD, GOOD)],
        [written(tmp_path / "between", GOOD, value, GOOD)],
        [written(tmp_path / "list", [GOOD, value, GOOD])],
        [written(tmp_path / "good", GOOD), written(tmp_path / "own", value), tmp_path / "good"],
    ):
        caplog.clear()
        trace = read_trace(paths, hints=HINTS)
        assert_rows(trace, np.concatenate([IDS[:-1]] * 2), [*range(8)] * 2, [0] * 8 + [1] * 8)
        assert told(caplog) == [f"left out 1 {what}"]
        assert re.search(rf"the first: \S+(: line \d|\[1\])+: {why}|{why}", caplog.text)


@pytest.mark.parametrize(("value", "what", "why"), LACKING)
def test_nothing_but_what_has_no_routing(value: Any, what: str, why: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a", value, vllm(None), value)
    with pytest.raises(
        InputError, match=rf"a: line 1: .*{why}.*; left out \d {what}, and no routing"
    ) as caught:
        read_trace([path], "responses", HINTS)
    assert str(caught.value).startswith(f"{path}: line 1: ")
    assert "\n" not in str(caught.value)


WRAPPED = [
    {"status": 200, "body": GOOD},
    {"id": "b", "custom_id": "x", "response": {"status_code": 200, "body": GOOD}, "error": None},
    {"request": {"prompt": "x"}, "response": GOOD},
]


@pytest.mark.parametrize("value", WRAPPED)
def test_responses_in_wrappers(value: Json, tmp_path: Path) -> None:
    assert_rows(read_trace([written(tmp_path / "a", value)], hints=HINTS), IDS[:-1])


TEXTS = [
    b"Internal Server Error\n",
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n</html>\r\n",
    b"data: [DONE]\n",
    b"\0\0\0\0\0\0\n",  # what a file system leaves after a crash
]


@pytest.mark.parametrize("text", TEXTS)
def test_lines_that_a_proxy_wrote(text: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, path = json.dumps(GOOD).encode() + b"\n", tmp_path / "a"
    for content in (good + text, text + good, good + text.strip()):
        caplog.clear()
        path.write_bytes(content)
        format = "responses" if content[0] == 0 else None  # which no text begins with
        assert_rows(read_trace([path], format, HINTS), IDS[:-1])
        assert told(caplog) == [f"left out {len(text.splitlines())} {TEXT}"]


def test_a_proxys_answer_in_a_file_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = written(tmp_path / "a", GOOD)
    (tmp_path / "b").write_text("upstream connect error é")
    assert_rows(read_trace([tmp_path / "b", good], hints=HINTS), IDS[:-1])
    assert told(caplog) == [f"left out 1 {TEXT}"]
    (tmp_path / "b").write_bytes(b"\x80\x04\x95")
    with pytest.raises(InputError, match=r"b: is in no format known here"):
        read_trace([good, tmp_path / "b"], hints=HINTS)


@pytest.mark.parametrize("cut", [1, 2, 40, -2])
def test_a_last_line_that_was_cut_off(cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, line = tmp_path / "a", json.dumps(GOOD)
    path.write_text(f"{line}\n{line[:cut]}")
    assert_rows(read_trace([path], hints=HINTS), IDS[:-1])
    assert told(caplog) == ["left out 1 lines that were cut off"]
    path.write_text(f"{line}\n{line[:cut]}\n{line}\n")
    with pytest.raises(InputError, match=r"a: line 2 is not valid JSON \(.*\); give the file whole"):
        read_trace([path], hints=HINTS)


def test_choices_without_routing_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = npy(whole(IDS[:-1]))
    for value in (
        {"choices": [{"routed_experts": text}, {"routed_experts": None}], "usage": USAGE},
        {"choices": [{"meta_info": {"routed_experts": text}}, {"meta_info": {}}]},
        {"choices": [{}, {}], "sglext": {"routed_experts": text}},
    ):
        caplog.clear()
        assert_rows(read_trace([written(tmp_path / "a", value)], hints=HINTS), IDS[:-1])
        assert told(caplog) == ["left out 1 choices without routing"]


# Encodings.

TEXT_FILES = {
    "responses line": json.dumps(GOOD) + "\n",
    "responses lines": 2 * (json.dumps(GOOD) + "\n"),
    "responses indented": json.dumps([GOOD], indent=1),
    "responses windows": json.dumps([GOOD], indent=1).replace("\n", "\r\n"),
}


def megatron(step: int, ids: Ids, **more: Any) -> list[Json]:
    shape = {"num_tokens": len(ids), "topk": ids.shape[2]}
    return [
        {"step": step, "block": "decoder", "layer": layer, "rank": 0, **shape}
        | {"top_indices": ids[:, layer].tolist(), **more}
        for layer in range(ids.shape[1])
    ]


MEGATRON = "".join(json.dumps(record) + "\n" for record in megatron(0, IDS))


@pytest.mark.parametrize("text", [*TEXT_FILES.values(), MEGATRON])
def test_a_mark_of_utf8_changes_nothing(text: str, tmp_path: Path) -> None:
    path, plain = tmp_path / "a", tmp_path / "b"
    plain.write_text(text)
    for content in (codecs.BOM_UTF8 + text.encode(), codecs.BOM_UTF8 + b"\r\n" + text.encode()):
        path.write_bytes(content)
        for format in (None, "megatron" if text == MEGATRON else "responses"):
            trace = read_trace([path], format, HINTS)
            assert trace.digest() == read_trace([plain], hints=HINTS).digest()


def test_files_with_marks_that_were_joined(tmp_path: Path) -> None:
    part = codecs.BOM_UTF8 + json.dumps(GOOD).encode() + b"\n"
    (tmp_path / "a").write_bytes(part + part)
    assert read_trace([tmp_path / "a"], hints=HINTS).num_tokens == 16


@pytest.mark.parametrize("text", [*TEXT_FILES.values(), MEGATRON])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("format", [None, "responses", "megatron"])
def test_wide_encodings_are_named(text: str, encoding: str, format: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a"
    marks = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}
    for mark in (b"", marks.get(encoding, b"")):
        path.write_bytes(mark + text.encode(encoding))
        name = encoding[:6].upper()
        with pytest.raises(InputError) as caught:
            read_trace([path], format, HINTS)
        assert str(caught.value) == f"{path}: is {name} text; save it as UTF-8 (iconv -f {name} -t UTF-8)"


@pytest.mark.parametrize(("start", "name"), [(b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")])
def test_packed_files_are_named(start: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(start + bytes(100))
    with pytest.raises(InputError, match=rf"a: is packed by {name}; unpack it first"):
        read_trace([tmp_path / "a"])


@pytest.mark.parametrize("length", [0x7B, 0xFEFF, 0x227B])
def test_safetensors_whose_length_looks_like_a_mark(length: int, tmp_path: Path) -> None:
    header = json.dumps({"1_0": {"dtype": "I32", "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
    content = length.to_bytes(8, "little") + header.ljust(length) + np.array([3, 4], "<i4").tobytes()
    (tmp_path / "a").write_bytes(content)
    assert read_trace([tmp_path / "a"], hints=HINTS).experts.tolist() == [[[3, 4]]]


def test_marks_in_files_beside(tmp_path: Path) -> None:
    path = tmp_path / "rank0_raw.safetensors"
    path.write_bytes(save({"1_0": np.array([[3, 4]], np.int32)}))
    meta = tmp_path / "meta_info.json"
    meta.write_bytes(codecs.BOM_UTF8 + b'{"num_experts": 8}')
    assert read_trace([path]).num_experts == 8
    meta.write_bytes('{"num_experts": 8}'.encode("utf-16"))
    with pytest.raises(
        InputError, match=r"meta_info\.json is not valid JSON \(it is UTF-16 text; save it as"
    ):
        read_trace([path])
    (tmp_path / "loads.json").write_bytes(codecs.BOM_UTF8 + b"[[1, 2]]")
    assert read_loads(tmp_path / "loads.json").tolist() == [[1, 2]]


# The prompt's routing apart (vLLM 0.21).

ALL, BEFORE, AFTER = whole(IDS[:-1]), whole(IDS[:PROMPT]), whole(IDS[PROMPT:-1])
PHASES = [PREFILL] * PROMPT + [DECODE] * (TOKENS - 1 - PROMPT)


def two_choices(first: Any, second: Any, **more: Any) -> Json:
    return {"choices": [{"routed_experts": first}, {"routed_experts": second}], "usage": USAGE} | more


@pytest.mark.parametrize("write", [lists, npy, raw])
@pytest.mark.parametrize("prompt_write", [lists, npy])
def test_a_prompt_apart(
    write: Callable[[Ids], Any], prompt_write: Callable[[Ids], Any], tmp_path: Path
) -> None:
    before, after = prompt_write(BEFORE), write(AFTER)
    choice = {"index": 0, "routed_experts": after, "prompt_routed_experts": before}
    for value in (
        vllm(after, prompt_routed_experts=before),
        {"choices": [choice], "usage": USAGE},
        {"choices": [choice]},
        {"choices": [choice], "prompt_routed_experts": None},
        {"routed_experts": after, "prompt_routed_experts": before},
        {"choices": [{"routed_experts": after}], "prompt_routed_experts": before, "usage": None},
        {"choices": [{"routed_experts": write(ALL)}], "prompt_routed_experts": before, "usage": USAGE},
    ):
        trace = read_trace([written(tmp_path / "a", value)], hints=HINTS)
        assert_rows(trace, IDS[:-1])
        assert (trace.phase.tolist(), trace.moe_layer_ids) == (PHASES, (1, 2, 3))


def test_parts_of_a_prompt_apart(tmp_path: Path) -> None:
    one_new = USAGE | {"completion_tokens": 1}
    longer = whole(IDS[PROMPT:])  # drafted tokens: a row for the last one, too
    for value, rows in (
        (vllm(None, prompt_routed_experts=lists(BEFORE), usage=one_new), range(PROMPT)),
        (vllm(None, prompt_routed_experts=lists(BEFORE)), range(PROMPT)),
        ({"choices": [], "prompt_routed_experts": lists(BEFORE)}, range(PROMPT)),
        ({"prompt_routed_experts": npy(BEFORE)}, range(PROMPT)),
        (vllm(lists(AFTER), prompt_routed_experts=None), range(PROMPT, TOKENS - 1)),
        (vllm(lists(AFTER), prompt_routed_experts=[]), range(PROMPT, TOKENS - 1)),
        (vllm(lists(longer), prompt_routed_experts=lists(BEFORE)), range(TOKENS)),
        (vllm(lists(AFTER), prompt_routed_experts=lists(BEFORE[2:])), range(2, TOKENS - 1)),
    ):
        trace = read_trace([written(tmp_path / "a", value)], hints=HINTS)
        assert_rows(trace, IDS[list(rows)], position=rows)
        assert trace.phase.tolist() == [PREFILL if row < PROMPT else DECODE for row in rows]


def test_a_prompt_of_several_choices_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, after = lists(BEFORE), lists(AFTER)
    both = np.concatenate([IDS[:-1], IDS[PROMPT:-1]])
    positions, sequences = [*range(8), 6, 7], [0] * 8 + [1] * 2
    apart = {"routed_experts": after, "prompt_routed_experts": before}
    for value in (two_choices(after, after, prompt_routed_experts=before), {"choices": [apart, apart]}):
        trace = read_trace([written(tmp_path / "a", value)], hints=HINTS)
        assert_rows(trace, both, positions, sequences)
        assert trace.phase.tolist() == [*PHASES, DECODE, DECODE]
    value = two_choices(None, after, prompt_routed_experts=before)
    assert_rows(
        read_trace([written(tmp_path / "a", value)], hints=HINTS),
        np.concatenate([IDS[:PROMPT], IDS[PROMPT:-1]]),
        [*range(8)],
        [0] * 6 + [1] * 2,
    )
    other = {
        "routed_experts": after,
        "prompt_routed_experts": lists(BEFORE[::-1]),
    }  # two prompts in a request
    trace = read_trace([written(tmp_path / "a", {"choices": [apart, other]})], hints=HINTS)
    assert trace.num_tokens == 16
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            vllm(lists(AFTER), prompt_routed_experts=lists(BEFORE[:, 1:])),
            r"prompt_routed_experts: has 3 layers a",
        ),
        (
            vllm(lists(ALL[:5]), prompt_routed_experts=lists(BEFORE)),
            r"6 tokens of the prompt and 5 others, the r",
        ),
        (vllm([[[1, 2], [3]]]), r"lists of different lengths; give the response whole"),
        (vllm([[1, 2]]), r"is int64 \(1, 2\); give integers \[tokens, hidden layers, top_k\]"),
        (vllm([[[1.5, 2]]]), r"is float64 \(1, 1, 2\); give integers"),
        (vllm([[[True, False]]]), r"is bool \(1, 1, 2\); give integers"),
        (vllm([[[1, 10**30]]]), r"is object \(1, 1, 2\); give integers"),
        (vllm([[["1", "2"]]]), r"is <U1 \(1, 1, 2\); give integers"),
        (vllm([[[]]]), r"is float64 \(1, 1, 0\); give integers"),
        (vllm(lists(AFTER), prompt_routed_experts=7), r"prompt_routed_experts: is 7; give the base64 text"),
        (vllm({"data": "AA"}), r"routed_experts: is \{'data': 'AA'\}; give the base64 text"),
    ],
)
def test_malformed_lists(value: Json, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_trace([written(tmp_path / "a", value)], hints=HINTS)
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: line 1: ")


def test_layers_of_arrays_without_dense_ones_are_named(tmp_path: Path) -> None:
    """Versions of vLLM record MoE layers alone: --moe-layers says which they are."""
    value = vllm(lists(IDS[PROMPT:-1]), prompt_routed_experts=lists(IDS[:PROMPT]))
    np.save(tmp_path / "a.npy", IDS[:-1])
    for path in (written(tmp_path / "a", value), tmp_path / "a.npy"):
        trace = read_trace([path], hints=Hints(EXPERTS, moe_layers=(1, 2, 5), hidden_layers=7))
        assert_rows(trace, IDS[:-1])
        assert (trace.moe_layer_ids, trace.num_hidden_layers) == ((1, 2, 5), 7)
        trace = read_trace([path], hints=Hints(EXPERTS))
        assert (trace.moe_layer_ids, trace.num_hidden_layers) == ((0, 1, 2), 3)


# Prefills alone (SGLang).


@pytest.mark.parametrize(
    ("rows", "prompt", "new", "first"),
    [
        (5, 6, 0, 0),  # without the last token's row
        (6, 6, 0, 0),  # with it
        (6, 6, 1, 0),
        (7, 6, 1, 0),
        (8, 6, 3, 0),
        (9, 6, 3, 0),
        (1, 1, 0, 0),
        (1, 1, 1, 0),
        (3, 6, 0, 2),  # from a start on
        (4, 6, 3, 4),
    ],
)
@pytest.mark.parametrize("place", ["meta_info", "choice", "usage"])
def test_rows_of_all_tokens(rows: int, prompt: int, new: int, first: int, place: str, tmp_path: Path) -> None:
    value = sglang(raw(whole(IDS[:rows])), prompt, new)
    if place == "choice":
        value = {"choices": [value]}
    elif place == "usage":
        meta = value["meta_info"]
        value = {"choices": [{}], "sglext": {"routed_experts": meta.pop("routed_experts")}, "usage": meta}
    trace = read_trace([written(tmp_path / "a", value)], hints=HINTS)
    assert_rows(trace, IDS[:rows], position=range(first, first + rows))
    assert trace.phase.tolist() == [PREFILL if first + row < prompt else DECODE for row in range(rows)]


@pytest.mark.parametrize(("rows", "prompt", "new"), [(7, 6, 0), (8, 6, 1), (2, 1, 0), (9, 0, 0)])
def test_more_rows_than_tokens(rows: int, prompt: int, new: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a", sglang(raw(whole(IDS[:rows])), prompt, new))
    with pytest.raises(
        InputError, match=rf"has rows for {rows} tokens, the response has {prompt + new}; give"
    ):
        read_trace([path], hints=HINTS)


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
