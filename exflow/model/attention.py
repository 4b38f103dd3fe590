"""Scaled dot-product attention, and an attention context for whole sequences of one length.

Training and profiling use this context, since they need no K/V cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exflow.model.decoder import Attention, Rows
from exflow.profiling.trace import PREFILL


def rows_of_batch(num_sequences: int, length: int, device: torch.device, first_sequence: int = 0) -> Rows:
    """Rows of `num_sequences` sequences of equal length, one sequence after the other."""
    sequence_T = torch.arange(first_sequence, first_sequence + num_sequences, device=device)
    position_T = torch.arange(length, device=device)
    return Rows(sequence_T.repeat_interleave(length), position_T.repeat(num_sequences), PREFILL)


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention over [..., heads, positions, width]; query heads may share key and value heads.

    mask: bool, True where a query sees a key; without it attention is causal. sinks_H: one extra score a head
    in the softmax, which adds no value. cuDNN's kernel is excluded: it takes some 100 ms to plan for each new
    shape, and shapes change with every decode step, and with every layer where tokens move between ranks.
    """
    width, scale = v.shape[-1], q.shape[-1] ** -0.5
    if sinks_H is not None:
        seen = causal(q.shape[-2], q.device) if mask is None else mask
        q, k, v, mask = with_sinks(q, k, v, seen, sinks_H / scale)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    return attended[..., :width]


def with_sinks(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, score_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append one position that all queries see: its score with head h is score_H[h], its value is zero.

    Queries and keys become wider: the extra number is score_H in queries, 1 in the new key and 0 in the other
    keys. Zeros follow, since kernels need widths that are multiples of 8.
    """
    scores = score_H.to(q.dtype)[:, None, None].expand(*q.shape[:-1], 1)
    k = F.pad(k, (0, 8, 0, 1))
    k[..., -1, -8] = 1
    return (
        F.pad(torch.cat([q, scores], dim=-1), (0, 7)),
        k,
        F.pad(v, (0, 8, 0, 1)),
        F.pad(seen, (0, 1), value=True),
    )


def causal(length: int, device: torch.device, window: int | None = None) -> Tensor:
    """Causal mask [length, length] bool: each position sees itself and earlier ones, `window` in all."""
    return seen_from(torch.arange(length, device=device), length, window)


def seen_from(position_T: Tensor, length: int, window: int | None) -> Tensor:
    """Mask [T, length] bool: which of the first `length` positions a token at each of `position_T` sees."""
    there = torch.arange(length, device=position_T.device)
    seen = there <= position_T[:, None]
    return seen if window is None else seen & (there > position_T[:, None] - window)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, layer: Attention) -> Tensor:
    """Attention of `layer` over whole sequences [..., heads, positions, width]."""
    length, window = q.shape[-2], layer.window
    mask = None if window is None or length <= window else causal(length, q.device, window)
    return scaled_dot_product(q, k, v, mask, layer.sinks)


class CausalAttention:
    """AttentionContext for rows laid out by `rows_of_batch`."""

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences

    def attend(self, layer: Attention, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        q, k, v = (
            part.unflatten(0, (self.num_sequences, -1)).transpose(1, 2) for part in (q_THC, k_TJC, v_TJC)
        )
        return causal_attention(q, k, v, layer).transpose(1, 2).flatten(0, 1)
