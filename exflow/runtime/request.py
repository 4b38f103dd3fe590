"""Requests to an engine, and their results."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from exflow.comm.collectives import Counters
from exflow.errors import InputError, WrongResult
from exflow.model.config import ModelConfig
from exflow.model.decoder import Rows
from exflow.model.sampling import GREEDY, Sampling

Observer = Callable[[Rows, Tensor], None]
"""Called with the rows and logits [T, V] of every choice of tokens."""

Advance = Callable[[int, int], None]
"""Called with the number of new tokens of each sequence so far, and its maximum."""


@dataclass(frozen=True)
class Request:
    """A batch of prompts to continue. prompts: token ids. end_tokens: ids of tokens that end a sequence."""

    prompts: list[list[int]]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    end_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation:
    """The new tokens of each prompt, with times in seconds, decode steps, and the job's counted traffic.

    prefill, decode: counters summed over ranks; collectives count once, since all ranks take part.
    """

    tokens: list[list[int]]
    prefill_s: float
    decode_s: float
    steps: int
    prefill: Counters
    decode: Counters

    @property
    def decoded_tokens(self) -> int:
        """Number of new tokens from decode steps; the first one of each sequence comes from prefill."""
        return sum(len(tokens) - 1 for tokens in self.tokens)

    @property
    def tokens_per_s(self) -> float:
        """Decode throughput of the whole job."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


def not_finite(number: int, step: int) -> WrongResult:
    return WrongResult(
        f"sequence {number}, step {step} (0 is the prompt's): the logits hold NaN or infinite values; "
        "the weights are finite, so what they compute overflows: try float32, or another checkpoint"
    )


def check_request(request: Request, config: ModelConfig) -> None:
    """Raise InputError for a request that the model cannot serve."""
    if not request.prompts:
        raise InputError("no prompt was given; give at least one")
    if request.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {request.max_new_tokens}; give 1 or more")
    for number, prompt in enumerate(request.prompts):
        if not prompt:
            raise InputError(f"prompt {number} is empty; give at least one token")
        if len(prompt) + request.max_new_tokens > config.max_positions:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens: with {request.max_new_tokens} new ones it "
                f"exceeds the model's {config.max_positions} positions; shorten it or lower --max-new-tokens"
            )
        if unknown := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise InputError(
                f"prompt {number} has token id {unknown[0]}, the vocabulary {config.vocab_size} entries; "
                "leave that token out, or make room for it in the model (resize_token_embeddings)"
            )
