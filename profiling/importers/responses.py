"""Responses of SGLang and vLLM with the routing of each request, as JSON or JSONL.

Where the routing is, and how it is written:

    meta_info.routed_experts              SGLang 0.5.23 /generate (managers/tokenizer_manager.py)
    sglext.routed_experts                 SGLang as OpenAI (entrypoints/openai/protocol.py)
    choices[].meta_info.routed_experts    the same with return_meta_info
    choices[].routed_experts              vLLM 0.33.0 (entrypoints/openai/completion/protocol.py)
    routed_experts                        what a script wrote itself

SGLang writes base64 of int32 [tokens, hidden layers, top_k] without a shape, vLLM base64 of a .npy file of
that shape. Both give logical ids, and no row for the last token, which was sampled and never run. With a
start in the request (routed_experts_start_len, routed_experts_prompt_start) the rows before it are missing.
"""

import base64
import binascii
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.arrays import ArrayStream
from exflow.profiling.importers.dense import RoutedLayers
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording
from exflow.profiling.importers.json_values import json_values, shown
from exflow.profiling.trace import DECODE, PREFILL

_log = logging.getLogger(__name__)

_NPY = b"\x93NUMPY"
_ASK = "start the server with --enable-return-routed-experts (SGLang: and ask for return_routed_experts)"


@dataclass(frozen=True)
class _Routing:
    """What a response holds of one sequence, and how many tokens, where that is told.

    billed  whether `usage` tells it, which may leave tokens out (SGLang's serving_chat.py does for Kimi K3)
    """

    place: str
    text: Any
    billed: bool
    prompt_tokens: int | None
    tokens: int | None


def open_responses(paths: Sequence[Path], hints: Hints) -> Recording:
    """One sequence a response or choice; those that a request did not get any routing for are left out.

    SGLang's form needs `hidden_layers` and `top_k` from the hints. Raises InputError where a response holds
    no routing, or routing of another shape than the hints or the token counts say.
    """
    return Recording(lambda: _rows(paths, hints))


def _rows(paths: Sequence[Path], hints: Hints) -> Iterator[ForeignRows]:
    layers = RoutedLayers(hints.moe_layers)
    number, missing = 0, 0
    for path in paths:
        for place, response, size in json_values(path):
            routings = list(_routings(path, place, response))
            for routing in routings:
                if routing.text is None:
                    missing += 1
                    continue
                experts = _experts(path, routing, hints)
                rows = _sequence(path, routing, experts, number, layers, size // len(routings))
                number += bool(len(rows.experts))
                yield rows
    layers.report()
    if missing:
        _log.warning("left out %d responses without routing (null: aborted?)", missing)


def _sequence(
    path: Path, routing: _Routing, experts: IntArray, number: int, layers: RoutedLayers, size: int
) -> ForeignRows:
    ids, captured = layers.split_zeros(path, experts)
    start = 0 if routing.tokens is None else routing.tokens - 1 - len(experts)
    if start >= 1 << 31:
        raise InputError(f"{path}: {routing.place}: counts {routing.tokens} tokens; give the response whole")
    if start < 0 and not routing.billed:
        raise InputError(
            f"{path}: {routing.place}: routed_experts: has rows for {len(experts)} tokens, the response has "
            f"{routing.tokens}; give the right --hidden-layers and --top-k"
        )
    position = (max(0, start) + np.arange(len(experts)))[captured]
    return ForeignRows(
        path=path,
        layers=ids,
        experts=experts[captured][:, list(ids)],
        sequence=np.full(len(position), number),
        position=position,
        phase=np.where(position < (routing.prompt_tokens or 0), PREFILL, DECODE),
        hidden_layers=experts.shape[1],
        num_bytes=size,
    )


def _routings(path: Path, place: str, response: Any) -> Iterator[_Routing]:
    """The routing of each sequence in a response; InputError where there is none."""
    if not isinstance(response, dict):
        raise InputError(f"{path}: {place}: is {shown(response)}; give the JSON object of a response")
    choices = response.get("choices")
    choices = [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    counts = response.get("usage") if len(choices) < 2 else None  # of several choices it is the sum
    found = False
    for holder, told in (
        (response.get("meta_info"), response.get("meta_info")),
        (response.get("sglext"), counts),
        *((one.get("meta_info"), one.get("meta_info")) for one in choices),
        *((one, counts) for one in choices),
        (response, counts),
    ):
        if isinstance(holder, dict) and "routed_experts" in holder:
            found = True
            billed = told is not holder
            yield _Routing(place, holder["routed_experts"], billed, *_tokens(told))
    if not found:
        raise InputError(f"{path}: {place}: holds no routed_experts; {_ASK}")


def _tokens(told: Any) -> tuple[int | None, int | None]:
    """Tokens of the prompt, and in all, where both are told."""
    if not isinstance(told, dict):
        return None, None
    prompt, completion = told.get("prompt_tokens"), told.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return None, None
    return prompt, prompt + completion


def _experts(path: Path, routing: _Routing, hints: Hints) -> IntArray:
    """[tokens, hidden layers, top_k] of one sequence."""
    where = f"{path}: {routing.place}: routed_experts"
    if not isinstance(routing.text, str):
        raise InputError(f"{where}: is {shown(routing.text)}; give the base64 text as the server wrote it")
    try:
        content = base64.b64decode(routing.text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: is not base64 ({error}); give the text as the server wrote it") from error
    return _of_npy(where, content) if content.startswith(_NPY) else _of_int32(where, content, hints)


def _of_npy(where: str, content: bytes) -> IntArray:
    try:
        array = ArrayStream(io.BytesIO(content), len(content)).whole()
    except Exception as error:  # numpy's parser of headers raises what it likes
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: is no .npy file ({reason}); give the response whole") from error
    if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape[1:]:
        raise InputError(
            f"{where}: is {array.dtype} {array.shape}; give integers [tokens, hidden layers, top_k]"
        )
    return array


def _of_int32(where: str, content: bytes, hints: Hints) -> IntArray:
    if hints.hidden_layers is None or hints.top_k is None:
        raise InputError(
            f"{where}: is SGLang's, which says no shape; give --hidden-layers and --top-k (num_hidden_layers "
            "and num_experts_per_tok in the model's config.json)"
        )
    width = 4 * hints.hidden_layers * hints.top_k
    if len(content) % width:
        raise InputError(
            f"{where}: has {len(content)} bytes, no multiple of {width} for a token (int32, "
            f"{hints.hidden_layers} layers, top {hints.top_k}); give the right --hidden-layers and --top-k"
        )
    return np.frombuffer(content, "<i4").reshape(-1, hints.hidden_layers, hints.top_k)
