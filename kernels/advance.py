"""The end of a step: the tokens chosen become the next step's."""

import triton
import triton.language as tl

from exflow.kernels.wire import after_earlier_kernels


@triton.jit
def advance(
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
    NOT_FINITE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (1,), of one warp: `done` and `step` are read by all threads and written by one. Notes the tokens
    of the owned rows; what has ended is owned by nobody from now on.

    best [rows] int64, the entry with the largest score, and score [rows], NaN if any entry's is; ends [ENDS]
    int64; chosen [positions, rows] int64, of which line `done` is written: -1 for rows not
    owned, NOT_FINITE instead of a token whose score is not finite. Then token
    [rows] int64, position [rows] int64, owned [rows] int32, done [1] and step [1] int64 are the next step's.
    """
    after_earlier_kernels(PDL)
    row = tl.arange(0, BLOCK)
    exists = row < rows
    here = tl.load(owned + row, mask=exists, other=0)
    new = tl.load(best + row, mask=exists, other=0)
    finite = tl.abs(tl.load(score + row, mask=exists, other=0.0).to(tl.float32)) < float("inf")
    at = tl.load(done)
    tl.store(
        chosen + at * rows + row, tl.where(here == 0, -1, tl.where(finite, new, NOT_FINITE)), mask=exists
    )
    for end in tl.static_range(ENDS):
        here = tl.where(new == tl.load(ends + end), 0, here)
    tl.store(owned + row, here, mask=exists)
    tl.store(token + row, new, mask=exists)
    tl.store(position + row, tl.load(position + row, mask=exists, other=0) + 1, mask=exists)
    tl.store(done, at + 1)
    tl.store(step, tl.load(step) + 1)
