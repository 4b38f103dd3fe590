"""Tokens whose routing was not captured, marked by -1: left out whole, for a trace has no gaps.

Their neighbours keep their positions, so nothing becomes adjacent that was not.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from exflow.profiling.importers.foreign import ForeignRows, IntArray
from exflow.profiling.importers.left_out import IN_PART, NOT_CAPTURED, LeftOut

Mask = npt.NDArray[np.bool_]


def gaps(experts: IntArray) -> Mask:
    """[tokens, layers, k] bool: True where `experts` hold the mark instead of an id.

    Written as unsigned numbers the mark is the largest of them; with k > 1, and in all k, it is no routing.
    """
    if experts.dtype.kind == "i":
        marked: Mask = experts == -1
        return marked
    largest = experts == np.iinfo(experts.dtype).max
    if experts.shape[2] == 1:
        return np.zeros_like(largest)
    return np.broadcast_to(largest.all(axis=2, keepdims=True), largest.shape)


def may_have_gaps(experts: IntArray) -> bool:
    """A quick test for marks, without an array of the block's size; callers complain of other negative
    numbers."""
    if experts.dtype.kind == "i":
        return bool(experts.min(initial=0) == -1)
    return bool(experts.max(initial=0) == np.iinfo(experts.dtype).max)


def without_gaps(block: ForeignRows, columns: list[int], left: LeftOut) -> ForeignRows:
    """The tokens that have ids in all layers of `columns`."""
    if not may_have_gaps(block.experts):
        return block
    gaps_TLk = gaps(block.experts[:, columns])
    whole: Mask = np.logical_not(gaps_TLk.any(axis=(1, 2)))
    captured: Mask = np.logical_not(gaps_TLk.all(axis=(1, 2)))
    count_gaps(str(block.path), whole, captured, left)
    return replace(
        block,
        experts=block.experts[whole],
        sequence=block.sequence[whole],
        position=block.position[whole],
        phase=block.phase[whole],
        weights=None if block.weights is None else block.weights[whole],
    )


def count_gaps(where: str, whole: Mask, captured: Mask, left: LeftOut) -> None:
    left.add(NOT_CAPTURED, where, int((~captured).sum()))
    left.add(IN_PART, where, int((captured & ~whole).sum()))
