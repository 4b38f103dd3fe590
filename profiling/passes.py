"""Identifies the rows of a Hugging Face model's forward pass: the sequence and position of each, or padding.

B rows of a batch with S tokens each, P tokens of each before them (in the cache), T = B * S.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from exflow.errors import InputError
from exflow.profiling.places import places
from exflow.profiling.sequences import PADDING
from exflow.profiling.trace import DECODE, PREFILL


@dataclass(frozen=True)
class PassTokens:
    """The rows of one pass: `sequence_T` (PADDING where a row is no token), `position_T`, and the phase."""

    sequence_T: Tensor
    position_T: Tensor
    phase: int


@dataclass(frozen=True)
class _Batch:
    """Content of a cache after a pass: the sequences `sequence_B`, and the `tokens` of each."""

    sequence_B: Tensor
    tokens: int


class Batches:
    """Numbers the sequences of batches, and knows a batch again by its cache.

    A pass without a cache, or with an empty one, begins new sequences; one with the cache of an earlier pass
    goes on with that pass's sequences. With beam search each beam is a sequence.
    """

    def __init__(self, model: str) -> None:
        """Create an empty register. model: its name, for errors."""
        self._model = model
        self._batches: WeakKeyDictionary[Any, _Batch] = WeakKeyDictionary()  # of each cache
        self._next = 0
        self._current: _Batch | None = None

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
        known = None if cache is None else self._batches.get(cache)
        past, aware = (0, True) if cache is None else _past(cache, 0 if known is None else known.tokens)
        if not aware:
            _check_unaware(self._model, arguments, past, length)
        sequence_B = self._sequences(known if past else None, size, inputs.device)
        self._current = _Batch(sequence_B, past + length)
        if cache is not None:
            self._batches[cache] = self._current
        position_BS, real_BS = places(arguments, past, size, length, inputs.device)
        sequence_BS = sequence_B[:, None].expand(size, length)
        if real_BS is not None:
            sequence_BS = torch.where(real_BS, sequence_BS.to(real_BS.device), PADDING)
        phase = DECODE if past and length == 1 else PREFILL
        return PassTokens(sequence_BS.flatten(), position_BS.flatten(), phase)

    def end(self, output: Any) -> None:
        """Remember the cache that a pass was called without and that its output holds."""
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        for value in values:
            if hasattr(value, "get_seq_length") and self._current is not None:
                self._batches.setdefault(value, self._current)

    def _sequences(self, known: "_Batch | None", size: int, device: torch.device) -> Tensor:
        """The sequence ids [B] of a batch that goes on, new ones where it is not known."""
        if known is not None and len(known.sequence_B) == size:
            return known.sequence_B
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


def _past(cache: Any, counted: int) -> tuple[int, bool]:
    """(tokens of each sequence in `cache`, whether the cache itself counts them); `counted` tokens were seen
    to go in.

    A cache asks its first layer for its length. In a hybrid model this may be a layer of linear attention,
    with a state and no length. Any layer of attention that was used knows the length; without one, tokens are
    counted.
    """
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None:
        return int(cache.get_seq_length()), True
    of_attention = [layer for layer in layers if hasattr(layer, "get_seq_length")]
    if of_attention or not _holds_states(cache, layers):
        lengths = ((int(layer.get_seq_length()), layer is of_attention[0]) for layer in of_attention)
        return next((found for found in lengths if found[0]), (0, True))
    if not counted:
        raise InputError(
            f"record: a {type(cache).__name__} without layers of attention does not say how many tokens went "
            "in before the recording; begin to record before its first pass"
        )
    return counted, True  # no layer asks it


def _holds_states(cache: Any, layers: list[Any]) -> bool:
    """True if layers of linear attention have seen a token."""
    kept_by_minimax = getattr(cache, "linear_cache", [])
    kept = (getattr(layer, "has_previous_state", {}) for layer in layers)  # for each state of a layer
    return bool(kept_by_minimax) or any(any(states.values()) for states in kept)


def _check_unaware(model: str, arguments: dict[str, Any], past: int, length: int) -> None:
    """Raise InputError for a pass that the model runs wrongly because its cache does not know its `past`: it
    masks and places tokens as if there were none.

    A step of one token without padding comes out right, if the model is told its position.
    """
    mask, told = arguments.get("attention_mask"), arguments.get("position_ids")
    padded = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
    if length > 1 or padded or not isinstance(told, Tensor) or not bool((told == past).all()):
        raise InputError(
            f"record: {model} runs this pass wrongly: its first layer has no attention, so its cache does "
            f"not tell it of the {past} tokens before; generate() from texts of one length, without padding, "
            "with a new cache each time, or give use_cache=False"
        )
