"""Attention itself, and its use over whole sequences of one length: training and profiling need no cache."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exflow.decoder import Rows
from exflow.profiling.trace import PREFILL


def rows_of_batch(num_sequences: int, length: int, device: torch.device, first_sequence: int = 0) -> Rows:
    """Rows of `num_sequences` sequences of equal length, one sequence after the other."""
    sequence_T = torch.arange(first_sequence, first_sequence + num_sequences, device=device)
    position_T = torch.arange(length, device=device)
    return Rows(sequence_T.repeat_interleave(length), position_T.repeat(num_sequences), PREFILL)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over [..., heads, positions, width], with fewer key than query heads or as many.

    Causal without a mask. cuDNN's kernel is left out: it builds a plan for every new shape, some 100 ms, and
    shapes change with every decode step and, where tokens move between ranks, with every layer.
    """
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )


class CausalAttention:
    """AttentionContext for rows laid out by `rows_of_batch`."""

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences

    def attend(self, layer: int, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        q, k, v = (
            part.unflatten(0, (self.num_sequences, -1)).transpose(1, 2) for part in (q_THC, k_TJC, v_TJC)
        )
        return scaled_dot_product(q, k, v).transpose(1, 2).flatten(0, 1)
