"""Builders of responses and logs with a routing of 9 tokens, and checks of what an import makes of them."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from exflow.profiling.importers.foreign import Hints
from exflow.profiling.trace import RoutingTrace

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
    """Return the messages without the places."""
    return [re.sub(r" \(the first: .*", "", record.getMessage()) for record in caplog.records]


def megatron(step: int, ids: Ids, **more: Any) -> list[Json]:
    shape = {"num_tokens": len(ids), "topk": ids.shape[2]}
    return [
        {"step": step, "block": "decoder", "layer": layer, "rank": 0, **shape}
        | {"top_indices": ids[:, layer].tolist(), **more}
        for layer in range(ids.shape[1])
    ]
