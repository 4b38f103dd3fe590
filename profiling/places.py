"""Places tokens of a Hugging Face model's pass: positions, and real or padding, by the mask and position ids.

B rows of a batch with S tokens each, C columns of a mask: the tokens that may be attended to.
"""

from typing import Any

import torch
from torch import Tensor

from exflow.errors import InputError


def places(
    arguments: dict[str, Any], past: int, size: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Positions [B, S], and a mask [B, S] of real tokens, or None where all are real."""
    told = _told(arguments.get("position_ids"))
    position_BS = (torch.arange(past, past + length, device=device)[None] if told is None else told).expand(
        size, length
    )
    mask, stop = arguments.get("attention_mask"), past + length
    if isinstance(mask, dict):
        mask = _mask_of_attention(mask)
        if told is not None and isinstance(mask, Tensor) and tuple(mask.shape) == (size, length):
            return position_BS, mask != 0  # of the tokens of this pass alone
    if mask is None:
        return position_BS, None
    known = isinstance(mask, Tensor) and mask.ndim in (2, 4)
    if not known or mask.shape[-1] < (stop if mask.ndim == 2 else length):
        raise InputError(
            f"record: an attention_mask {_describe(mask)} does not tell which of {stop} tokens are padding; "
            f"give one [batch, {stop}], and load the model with attn_implementation sdpa or eager"
        )
    if mask.ndim == 2:
        counted_BS = mask[:, :stop].long().cumsum(dim=1)[:, past:] - 1
        return counted_BS, mask[:, past:stop] != 0
    # bool masks allow where True, the others where they add 0
    allowed_BSC = (mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0)[:, :length]
    before = min(past, mask.shape[-1] - length)  # a sliding window has columns for the latest tokens alone
    real_BS = allowed_BSC.diagonal(offset=before, dim1=1, dim2=2).expand(size, length)  # it sees itself
    if told is None and arguments.get("position_ids") is not None:
        position_BS = (allowed_BSC.sum(dim=2) - 1).expand(size, length)
    return position_BS, real_BS


def _mask_of_attention(masks: dict[str, Any]) -> Any:
    """The mask that shows most of the past, of a mask for each kind of layer."""
    if "full_attention" in masks:
        return masks["full_attention"]
    known = [mask for mask in masks.values() if isinstance(mask, Tensor)]
    return max(known, key=lambda mask: (mask.ndim, mask.shape[-1]), default=None)


def _told(position_ids: Any) -> Tensor | None:
    """The positions [B, S] that a model is told, or None where it is told none, or those of images."""
    if isinstance(position_ids, Tensor) and position_ids.ndim == 3 and len(position_ids) == 4:
        return position_ids[0]  # of text; those of time, height and width follow
    return position_ids if isinstance(position_ids, Tensor) and position_ids.ndim == 2 else None


def _describe(mask: Any) -> str:
    return f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
