"""Responses of SGLang and vLLM with the routing of each request, as JSON or JSONL.

Where the routing is, and how it is written:

    meta_info.routed_experts              SGLang 0.5.23 /generate (managers/tokenizer_manager.py)
    sglext.routed_experts                 SGLang as OpenAI (entrypoints/openai/protocol.py)
    choices[].meta_info.routed_experts    the same with return_meta_info
    choices[].routed_experts              vLLM 0.33.0 (entrypoints/openai/completion/protocol.py)
    prompt_routed_experts                 vLLM 0.21: the prompt's rows, beside the choices or in them, which
                                          then hold the others
    routed_experts                        what a script wrote itself

SGLang writes base64 of int32 [tokens, hidden layers, top_k] without a shape, vLLM base64 of a .npy file of
that shape, vLLM 0.21 lists, and versions of it record MoE layers alone. All give logical ids, and no row for
the last token, which was sampled and never run; where nothing was sampled (a prefill alone), or tokens were
drafted, it may have one. With a start in the request (routed_experts_start_len, routed_experts_prompt_start)
the rows before it are missing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.dense import RoutedLayers
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording
from exflow.profiling.importers.json_values import json_values
from exflow.profiling.importers.left_out import LeftOut
from exflow.profiling.importers.replies import PROMPT, ROUTED, lack, unwrapped
from exflow.profiling.importers.routed_experts import ids_of, is_empty
from exflow.profiling.trace import DECODE, PREFILL


@dataclass(frozen=True)
class _Told:
    """Token counts of a sequence, as the response states them; None where it does not.

    billed  whether `usage` tells it, which may leave tokens out (SGLang's serving_chat.py does for Kimi K3)
    """

    billed: bool
    prompt: int | None = None
    all: int | None = None


@dataclass(frozen=True, eq=False)
class _Sequence:
    """The rows of one sequence, from position `start` on."""

    experts: IntArray
    start: int
    prompt_tokens: int


def open_responses(paths: Sequence[Path], hints: Hints) -> Recording:
    """One sequence a response or choice.

    Left out are errors among the responses, and those that did not get any routing. A prompt that a server
    returned once for several choices counts once, in the sequence of the first; the others begin after it.

    SGLang's form needs `hidden_layers` and `top_k` from the hints. Raises InputError where routing has
    another shape than the hints or the token counts say.
    """
    return Recording(lambda left: _rows(paths, hints, left))


def _rows(paths: Sequence[Path], hints: Hints, left: LeftOut) -> Iterator[ForeignRows]:
    layers = RoutedLayers(hints.moe_layers, left)
    number = 0
    for path in paths:
        for place, value, size in json_values(path, left):
            sequences = list(_sequences(f"{path}: {place}", unwrapped(value), hints, left))
            for sequence in sequences:
                rows = _placed(path, sequence, number, layers, size // len(sequences))
                number += bool(len(rows.experts))
                yield rows


def _placed(path: Path, sequence: _Sequence, number: int, layers: RoutedLayers, size: int) -> ForeignRows:
    experts = sequence.experts
    routed = layers.split_zeros(path, experts)
    position = (sequence.start + np.arange(len(experts)))[routed.whole]
    return ForeignRows(
        path=path,
        layers=routed.layers,
        experts=experts[routed.whole][:, routed.columns],
        sequence=np.full(len(position), number),
        position=position,
        phase=np.where(position < sequence.prompt_tokens, PREFILL, DECODE),
        hidden_layers=routed.hidden_layers,
        num_bytes=size,
    )


def _sequences(where: str, response: Any, hints: Hints, left: LeftOut) -> Iterator[_Sequence]:
    """The sequences of a response that have rows; the others are counted."""
    holders = list(_holders(response)) if isinstance(response, dict) else []
    texts = [(holder.get(ROUTED), _prompt_of(holder, response)) for holder, _ in holders]
    if all(is_empty(text) for pair in texts for text in pair):
        what, why = lack(response)
        left.add(what, f"{where}: {why}")
        return
    prompts: list[tuple[Any, int]] = []  # what was counted, and its rows
    for (text, prompt_text), (_, told) in zip(texts, holders, strict=True):
        rest = None if is_empty(text) else ids_of(f"{where}: {ROUTED}", text, hints)
        if is_empty(prompt_text):
            if rest is None:
                left.add("choices without routing", where)
            else:
                yield _alone(where, rest, told)
            continue
        counted = next((rows for other, rows in prompts if other == prompt_text), None)
        if counted is None:
            prompt = ids_of(f"{where}: {PROMPT}", prompt_text, hints)
            prompts.append((prompt_text, len(prompt)))
            yield _with_prompt(where, prompt, rest, told)
        elif rest is not None:
            yield _Sequence(rest, counted, counted)


def _prompt_of(holder: dict[str, Any], response: dict[str, Any]) -> Any:
    own = holder.get(PROMPT)
    return response.get(PROMPT) if is_empty(own) else own


def _holders(response: dict[str, Any]) -> Iterator[tuple[dict[str, Any], _Told]]:
    """Yield for each sequence the object that holds its routing, and its stated token counts."""
    choices = response.get("choices")
    choices = [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    usage = _told(response.get("usage"), billed=True) if len(choices) < 2 else _Told(True)  # a sum of several
    whole = [
        (holder, _told(holder, billed=False) if holder is response.get("meta_info") else usage)
        for holder in (response.get("meta_info"), response.get("sglext"), response)
        if isinstance(holder, dict) and not is_empty(holder.get(ROUTED))
    ]
    of_choices = [_of_choice(choice, usage) for choice in choices]
    if whole and not any(not is_empty(holder.get(ROUTED)) for holder, _ in of_choices):
        yield whole[0]  # of several choices SGLang returns the first one's
        yield from of_choices[1:]
    else:
        yield from of_choices or [(response, usage)]


def _of_choice(choice: dict[str, Any], usage: _Told) -> tuple[dict[str, Any], _Told]:
    meta = choice.get("meta_info")
    if isinstance(meta, dict) and not is_empty(meta.get(ROUTED)):
        return meta, _told(meta, billed=False)
    return choice, usage


def _told(counts: Any, billed: bool) -> _Told:
    """Tokens of the prompt, and in all, where `counts` states both."""
    if not isinstance(counts, dict):
        return _Told(billed)
    prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return _Told(billed)
    return _Told(billed, prompt, prompt + completion)


def _with_prompt(where: str, prompt: IntArray, rest: IntArray | None, told: _Told) -> _Sequence:
    """The prompt's rows and those after it; a server may have written them all in the choice as well."""
    if rest is None:
        rest = prompt[:0]
    if prompt.shape[1:] != rest.shape[1:]:
        raise InputError(
            f"{where}: {PROMPT}: has {prompt.shape[1]} layers and top {prompt.shape[2]}, {ROUTED} "
            f"{rest.shape[1]} and {rest.shape[2]}; give the response whole"
        )
    if told.prompt is None or told.all is None:
        return _Sequence(_joined(prompt, rest), 0, len(prompt))
    rows = len(prompt) + len(rest)
    if rows > told.all:
        if len(rest) in (told.all - 1, told.all):
            return _alone(where, rest, told)
        raise InputError(
            f"{where}: has rows for {len(prompt)} tokens of the prompt and {len(rest)} others, the response "
            f"has {told.all} tokens; give the response whole"
        )
    start = 0 if rows >= told.all - 1 else max(0, told.prompt - len(prompt))
    return replace(_alone(where, _joined(prompt, rest), told), start=start)


def _alone(where: str, experts: IntArray, told: _Told) -> _Sequence:
    """Rows that end at the last token but one, or at the last where there are as many as tokens."""
    tokens = len(experts) + 1 if told.all is None else told.all
    start = tokens - 1 - len(experts)
    if start >= 1 << 31:
        raise InputError(f"{where}: counts {tokens} tokens; give the response whole")
    if start < -1 and not told.billed:
        raise InputError(
            f"{where}: {ROUTED}: has rows for {len(experts)} tokens, the response has {tokens}; give the "
            "right hidden_layers and top_k"
        )
    return _Sequence(experts, max(0, start), told.prompt or 0)


def _joined(prompt: IntArray, rest: IntArray) -> IntArray:
    if prompt.dtype == rest.dtype:
        return np.concatenate([prompt, rest])
    return np.concatenate([prompt.astype(np.int64), rest.astype(np.int64)])
