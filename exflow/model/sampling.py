"""Choosing the next token: greedy, or sampled with noise that depends only on the seed and the place.

The noise of (seed, sequence, position, vocabulary entry) comes from a counter, not from a stream, so a
sequence samples the same tokens on any rank and in any batch.

Shapes: T tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exflow.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. temperature: 0 is greedy. top_p: keep the most probable entries that together
    reach this probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, no probability; give more than 0, at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed is {self.seed}; give 0 to {(1 << 63) - 1}")


GREEDY = Sampling()


def choose_tokens(logits_TV: Tensor, sampling: Sampling, sequence_T: Tensor, position_T: Tensor) -> Tensor:
    """The next token of each row [T] int64."""
    return scores_of(logits_TV, sampling, sequence_T, position_T).argmax(dim=-1)


def scores_of(
    logits_TV: Tensor,
    sampling: Sampling,
    sequence_T: Tensor,
    position_T: Tensor,
    seed: Tensor | None = None,
) -> Tensor:
    """Scores [T, V] whose argmax is the next token of each row: logits, with Gumbel noise if sampled.

    seed [] int64: sampling's seed, if it is on the logits' device already.
    """
    if sampling.temperature == 0:
        return logits_TV
    below_best_TV = logits_TV - logits_TV.amax(dim=-1, keepdim=True)  # so that no temperature overflows
    scores_TV = keep_top_p(below_best_TV / sampling.temperature, sampling.top_p)
    entry_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    place_TV = (sequence_T[:, None] << 40) + (position_T[:, None] << 20) + entry_V  # vocabularies < 2**20
    if seed is None:
        seed = torch.tensor(sampling.seed, device=logits_TV.device)
    uniform_TV = uniform(mix(place_TV ^ mix(seed)))
    return scores_TV - torch.log(-torch.log(uniform_TV))  # the Gumbel-max trick


def keep_top_p(scores_TV: Tensor, top_p: float) -> Tensor:
    """Set scores outside the smallest set of entries whose probability reaches `top_p` to -inf.

    Among equal scores earlier entries are kept.
    """
    if top_p == 1:
        return scores_TV
    best_first_TV, order_TV = scores_TV.sort(dim=-1, descending=True, stable=True)
    probability_TV = best_first_TV.softmax(dim=-1)
    before_TV = probability_TV.cumsum(dim=-1) - probability_TV
    drop_TV = torch.zeros_like(scores_TV, dtype=torch.bool).scatter(1, order_TV, before_TV >= top_p)
    return scores_TV.masked_fill(drop_TV, -torch.inf)


def mix(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on int64 with wrap-around."""
    bits = bits + _signed(0x9E3779B97F4A7C15)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift_right(bits, 31)


def uniform(bits: Tensor) -> Tensor:
    """Map random bits, int64, to float64 in the open interval (0, 1)."""
    return (_shift_right(bits, 12).double() + 0.5) / (1 << 52)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)  # logical shift: int64's own keeps the sign


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
