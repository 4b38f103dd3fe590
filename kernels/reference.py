"""Dispatch, experts and combine in plain torch: the reference against which faster backends are tested.

Shapes: T tokens, K choices a token, R = rows (token, choice) computed here, S slots, D hidden, F inner width,
W rows of an expert's w_in: F, or 2F if the activation is gated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]  # [R, W] -> [R, F]


@dataclass(frozen=True)
class SlotRows:
    """The (token, choice) pairs whose expert is on this rank, in ascending order of slot.

    token_R    int64, the row of `hidden` that a pair reads and adds to
    weight_R   gate weight of the pair
    counts_S   int64, pairs per slot; they sum to R
    """

    token_R: Tensor
    weight_R: Tensor
    counts_S: Tensor


def dispatch(slots_TK: Tensor, weights_TK: Tensor, num_slots: int) -> SlotRows:
    """Group the pairs by slot; a slot of -1 is an expert on another rank, and is left out.

    Three tokens, two slots, top-2: slots [[1, -1], [0, 1], [-1, -1]] give token_R [1, 0, 1] and
    counts_S [1, 2].
    """
    slot_R, order_R = torch.sort(slots_TK.flatten(), stable=True)
    order_R = order_R[slot_R >= 0]
    counts_S = torch.bincount(slot_R[slot_R >= 0], minlength=num_slots)
    return SlotRows(order_R // slots_TK.shape[1], weights_TK.flatten()[order_R], counts_S)


def swiglu(gate_up_RW: Tensor) -> Tensor:
    """silu(gate) * up -> [R, F]; the first half of a row is the gate, the second is up."""
    gate_RF, up_RF = gate_up_RW.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


@dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit`, up within +-limit."""

    alpha: float
    limit: float

    def __call__(self, gate_up_RW: Tensor) -> Tensor:
        """Map rows [R, 2F] to [R, F]; the first half of a row is the gate, the second is up."""
        gate_RF, up_RF = gate_up_RW.chunk(2, dim=-1)
        gate_RF, up_RF = gate_RF.clamp(max=self.limit), up_RF.clamp(-self.limit, self.limit)
        return (up_RF + 1) * gate_RF * torch.sigmoid(self.alpha * gate_RF)


def rows_of_w_in(inner: int, activation: Activation) -> int:
    """W, the rows of w_in, for an inner width F."""
    return 2 * inner if activation is swiglu or isinstance(activation, ClampedSwiglu) else inner


def experts(
    rows_RD: Tensor,
    counts_S: Tensor,
    w_in_SWD: Tensor,
    w_out_SDF: Tensor,
    activation: Activation,
    b_in_SW: Tensor | None = None,
    b_out_SD: Tensor | None = None,
) -> Tensor:
    """Apply expert s to its counts_S[s] consecutive rows -> [R, D].

    activation(rows @ w_in.T + b_in) @ w_out.T + b_out
    """
    parts = []
    for slot, rows in enumerate(torch.split(rows_RD, counts_S.tolist())):
        if len(rows):
            b_in_W, b_out_D = (None if bias is None else bias[slot] for bias in (b_in_SW, b_out_SD))
            inner = activation(F.linear(rows, w_in_SWD[slot], b_in_W))
            parts.append(F.linear(inner, w_out_SDF[slot], b_out_D))
    return torch.cat(parts) if parts else rows_RD


def combine(out_RD: Tensor, rows: SlotRows, num_tokens: int) -> Tensor:
    """Sum each token's weighted expert outputs -> [T, D]; a token with no expert here gets zeros."""
    weighted_RD = out_RD * rows.weight_R[:, None].to(out_RD.dtype)
    return out_RD.new_zeros(num_tokens, out_RD.shape[1]).index_add(0, rows.token_R, weighted_RD)
