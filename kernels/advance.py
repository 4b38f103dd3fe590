"""End of a step: the chosen tokens become the next step's input."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exflow.kernels.operands import expect, power_of_2
from exflow.kernels.wire import after_earlier_kernels

NONFINITE_TOKEN = -2  # recorded instead of a token chosen from NaN or infinite logits


@triton.jit
def advance_kernel(
    best,
    score,
    ends,
    chosen,
    token,
    position,
    owned,
    done,
    step,
    rows,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
    NONFINITE_TOKEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (1,), of one warp: all threads read `done` and `step`, and one writes them.

    Records the tokens of the owned rows; nobody owns a sequence that has ended.
    best [rows] int64: the entry with the largest score. score [rows]: its score, NaN if any entry's is NaN.
    ends [ENDS] int64. chosen [positions, rows] int64: line `done` is written, -1 for rows not owned,
    NONFINITE_TOKEN for a score that is not finite. token [rows] int64, position [rows] int64, owned [rows]
    int32, done [1] and step [1] int64 are updated for the next step.
    """
    after_earlier_kernels(PDL)
    row = tl.arange(0, BLOCK)
    exists = row < rows
    here = tl.load(owned + row, mask=exists, other=0)
    new = tl.load(best + row, mask=exists, other=0)
    finite = tl.abs(tl.load(score + row, mask=exists, other=0.0).to(tl.float32)) < float("inf")
    at = tl.load(done)
    tl.store(
        chosen + at * rows + row, tl.where(here == 0, -1, tl.where(finite, new, NONFINITE_TOKEN)), mask=exists
    )
    for end in tl.static_range(ENDS):
        here = tl.where(new == tl.load(ends + end), 0, here)
    tl.store(owned + row, here, mask=exists)
    tl.store(token + row, new, mask=exists)
    tl.store(position + row, tl.load(position + row, mask=exists, other=0) + 1, mask=exists)
    tl.store(done, at + 1)
    tl.store(step, tl.load(step) + 1)


def advance(
    *,
    best: Tensor,
    score: Tensor,
    ends: Tensor,
    chosen: Tensor,
    token: Tensor,
    position: Tensor,
    owned: Tensor,
    done: Tensor,
    step: Tensor,
    launch: dict[str, Any],
) -> None:
    """Launch `advance_kernel`: record the tokens of the owned rows, and make them the next step's input.

    ends [ENDS + 1] int64: the tokens that end a sequence, and one more, so that the tensor is never empty.
    """
    rows = len(best)
    expect(torch.int64, (rows,), best=best, token=token, position=position)
    expect(torch.int64, (len(chosen), rows), chosen=chosen)
    expect(torch.int64, (1,), done=done, step=step)
    expect(torch.int32, (rows,), owned=owned)
    expect(score.dtype, (rows,), score=score)
    advance_kernel[(1,)](
        best=best,
        score=score,
        ends=ends,
        chosen=chosen,
        token=token,
        position=position,
        owned=owned,
        done=done,
        step=step,
        rows=rows,
        ENDS=len(ends) - 1,
        NONFINITE_TOKEN=NONFINITE_TOKEN,
        BLOCK=power_of_2(rows),
        num_warps=1,
        **launch,
    )
