"""Responses that hold the prompt's routing apart, in parts, or with more rows than tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.registry import read_trace
from exflow.profiling.trace import DECODE, PREFILL
from tests.profiling.responses import (
    EXPERTS,
    HINTS,
    IDS,
    PROMPT,
    TOKENS,
    USAGE,
    Ids,
    Json,
    assert_rows,
    lists,
    npy,
    raw,
    sglang,
    told,
    vllm,
    whole,
    written,
)

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
