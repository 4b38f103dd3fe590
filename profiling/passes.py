"""Which token each row of a Hugging Face model's forward pass is: its sequence, its position, or padding.

B rows of a batch with S tokens each, P tokens of each before them (in the cache), T = B * S.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from exflow.errors import InputError
from exflow.profiling.sequences import PADDING
from exflow.profiling.trace import DECODE, PREFILL


@dataclass(frozen=True)
class PassTokens:
    """The rows of one pass: `sequence_T` (PADDING where a row is no token), `position_T`, and the phase."""

    sequence_T: Tensor
    position_T: Tensor
    phase: int


class Batches:
    """Numbers the sequences of batches, and knows a batch again by its cache.

    A pass without a cache, or with an empty one, begins new sequences; one with the cache of an earlier pass
    goes on with that pass's sequences. With beam search each beam is a sequence.
    """

    def __init__(self) -> None:
        self._batches: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()  # cache -> sequence ids [B]
        self._next = 0
        self._current_B: Tensor | None = None

    def begin(self, arguments: dict[str, Any]) -> PassTokens:
        """The tokens of a pass, from what the stack of layers is called with.

        A pass of one token with a past is DECODE, any other is PREFILL.
        Raises InputError where a cache or a mask does not tell which tokens are real.
        """
        inputs = arguments.get("input_ids")
        inputs = arguments.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise InputError("record: the layers got neither input_ids nor inputs_embeds; call the model")
        size, length = inputs.shape[:2]
        cache = _cache(arguments)
        past = 0 if cache is None else int(cache.get_seq_length())
        sequence_B = self._sequences(cache if past else None, size, inputs.device)
        if cache is not None:
            self._batches[cache] = sequence_B
        self._current_B = sequence_B
        position_BS, real_BS = _places(arguments, past, size, length, inputs.device)
        sequence_BS = sequence_B[:, None].expand(size, length)
        if real_BS is not None:
            sequence_BS = torch.where(real_BS, sequence_BS.to(real_BS.device), PADDING)
        phase = DECODE if past and length == 1 else PREFILL
        return PassTokens(sequence_BS.flatten(), position_BS.flatten(), phase)

    def end(self, output: Any) -> None:
        """Remember the cache that a pass was called without and that its output holds."""
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        for value in values:
            if hasattr(value, "get_seq_length") and self._current_B is not None:
                self._batches.setdefault(value, self._current_B)

    def _sequences(self, cache: Any, size: int, device: torch.device) -> Tensor:
        """The sequence ids [B] of the batch whose past `cache` holds, new ones where it is not known."""
        known_B = None if cache is None else self._batches.get(cache)
        if known_B is not None and len(known_B) == size:
            return known_B
        self._next += size
        return torch.arange(self._next - size, self._next, device=device)


def _cache(arguments: dict[str, Any]) -> Any:
    """The cache, by the name it has up to transformers 5.23 or from there on."""
    cache = arguments.get("past_key_values")
    cache = arguments.get("cache") if cache is None else cache
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise InputError(
            f"record: a cache of type {type(cache).__name__} does not tell sequences apart; "
            "use generate() in place of continuous batching"
        )
    return cache


def _places(
    arguments: dict[str, Any], past: int, size: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Positions [B, S], and which are real tokens [B, S], or None where all are."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict):  # a mask for each kind of layer
        mask = mask.get("full_attention", mask)
    if mask is None:
        return _positions(arguments, past, size, length, device), None
    stop = past + length
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4) or mask.shape[-1] < stop:
        raise InputError(
            f"record: an attention_mask {_describe(mask)} does not tell which of {stop} tokens are padding; "
            f"give one [batch, {stop}], and load the model with attn_implementation sdpa or eager"
        )
    if mask.ndim == 2:
        counted_BS = mask[:, :stop].long().cumsum(dim=1)[:, past:] - 1
        return counted_BS, mask[:, past:stop] != 0
    # a token that may attend to itself is real: bool masks allow where True, the others where they add 0
    itself_BS = mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)[:, :length].expand(size, length)
    real_BS = itself_BS if mask.dtype == torch.bool else itself_BS == 0
    return _positions(arguments, past, size, length, mask.device), real_BS


def _positions(arguments: dict[str, Any], past: int, size: int, length: int, device: torch.device) -> Tensor:
    """The positions [B, S] that the model is told, or those it takes by itself."""
    told = arguments.get("position_ids")
    if not isinstance(told, Tensor) or told.ndim != 2:
        told = torch.arange(past, past + length, device=device)[None]
    return told.expand(size, length)


def _describe(mask: Any) -> str:
    return f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
