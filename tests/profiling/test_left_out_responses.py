"""Responses without routing among others: errors, stray lines, cut lines. The rest is imported."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.profiling.importers.registry import read_trace
from tests.profiling.responses import (
    GOOD,
    HINTS,
    IDS,
    USAGE,
    Json,
    assert_rows,
    npy,
    sglang,
    told,
    vllm,
    whole,
    written,
)

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
