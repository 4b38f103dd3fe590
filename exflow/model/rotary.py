"""Rotary positions: queries and keys of each head are rotated by angles proportional to the position.

The angle between a query and a key then depends only on their distance. Shapes: T tokens, H heads, C head
width; number c and number c + C/2 of a head are a pair.
"""

from math import ceil, floor, log, tau

import torch
from torch import Tensor

from exflow.model.config import Rope, Yarn


class Rotary:
    """Rotates queries and keys of heads of one width. Not a module: it has no weights and stays float32."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self.frequency = frequencies(rope, head_dim)
        self.scale = 1.0 if rope.yarn is None else rope.yarn.attention_factor

    def __call__(self, position_T: Tensor, *heads_THC: Tensor) -> list[Tensor]:
        """Rotate each of `heads_THC` by the tokens' positions [T] int64."""
        cos_T1P, sin_T1P = (part[:, None] for part in self.turns(position_T))
        return [turned(heads, cos_T1P, sin_T1P) for heads in heads_THC]

    def turns(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines and sines of each pair's angle, scaled by YaRN's factor: [T, C / 2] float32 each."""
        if self.frequency.device != position_T.device:
            self.frequency = self.frequency.to(position_T.device)
        angle_TP = position_T[:, None].float() * self.frequency
        return self.scale * angle_TP.cos(), self.scale * angle_TP.sin()


def turned(heads_THC: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """Rotate every pair (a, b) to (a cos - b sin, b cos + a sin)."""
    a, b = heads_THC.float().chunk(2, dim=-1)
    rotated = torch.cat([a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P], dim=-1)
    return rotated.to(heads_THC.dtype)


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Angular frequency of each pair [C / 2] float32, in radians a position; always on the CPU."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    kept = 1.0 / rope.theta ** (pair / head_dim)
    if rope.yarn is None:
        return kept
    interpolated = 1.0 / (rope.yarn.factor * rope.theta ** (pair / head_dim))
    first, last = ramp(rope.theta, rope.yarn, head_dim)
    slowness = ((pair / 2 - first) / (last - first)).clamp(0, 1)
    return interpolated * slowness + kept * (1 - slowness)


def ramp(theta: float, yarn: Yarn, head_dim: int) -> tuple[float, float]:
    """First and last pair of YaRN's ramp from kept to interpolated frequencies."""

    def pair_turning(times: float) -> float:
        """The pair, as a real number, that turns `times` times in the original positions."""
        return head_dim * log(yarn.original_positions / (times * tau)) / (2 * log(theta))

    first, last = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last if last != first else last + 0.001
