"""Arrays saved by numpy.save: the original ExFlow's trace, and vLLM's routed_experts of one request."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.arrays import ArrayStream, rows_in_a_block
from exflow.profiling.importers.dense import RoutedLayers
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording, parsing
from exflow.profiling.importers.left_out import WITHOUT_TOKENS, LeftOut
from exflow.profiling.trace import DECODE

_REMEDY = "give an .npy of integers [tokens, layers], or [tokens, hidden layers, top_k] (numpy.save)"


def open_npy(paths: Sequence[Path], hints: Hints) -> Recording:
    """Each file is one sequence, for it knows none.

    Two dimensions, [tokens, layers]: the expert of a top-1 router, every layer a MoE layer (YJHMITWEB/ExFlow
    solve_affinity.py). Three, [tokens, hidden layers, top_k]: `CompletionOutput.routed_experts` of vLLM
    0.33.0 (vllm/outputs.py), where dense layers are zeros.

    Raises InputError for a damaged file, an object array, or another number of dimensions.
    """
    return Recording(lambda left: _rows(paths, hints, left))


def _rows(paths: Sequence[Path], hints: Hints, left: LeftOut) -> Iterator[ForeignRows]:
    routed = RoutedLayers(hints.moe_layers, left)
    number = 0
    for path in paths:
        start, kept = 0, 0
        with parsing(path, _REMEDY), path.open("rb") as file:
            stream = ArrayStream(file, path.stat().st_size)
            if len(stream.shape) not in (2, 3) or 0 in stream.shape[1:]:
                raise InputError(f"{path}: experts: shape is {stream.shape}; {_REMEDY}, none of them 0")
            if stream.dtype.kind not in "iu":
                raise InputError(f"{path}: experts: dtype is {stream.dtype}; give integers")
            if not stream.shape[0]:
                left.add(WITHOUT_TOKENS, f"{path}: experts: shape is {stream.shape}")
            for block in stream.blocks(rows_in_a_block(int(np.prod(stream.shape[1:])), stream.dtype)):
                part = _sequence_part(path, block, number, start, routed)
                yield part
                start, kept = start + len(block), kept + len(part.experts)
        number += kept > 0


def _sequence_part(path: Path, block: IntArray, number: int, start: int, routed: RoutedLayers) -> ForeignRows:
    position = np.arange(start, start + len(block))
    if block.ndim == 2:
        experts, layers, hidden = block[:, :, np.newaxis], tuple(range(block.shape[1])), None
    else:
        split = routed.split_zeros(path, block)
        experts, position = block[split.whole][:, split.columns], position[split.whole]
        layers, hidden = split.layers, split.hidden_layers
    return ForeignRows(
        path=path,
        layers=layers,
        experts=experts,
        sequence=np.full(len(experts), number),
        position=position,
        phase=np.full(len(experts), DECODE),
        hidden_layers=hidden,
        num_bytes=block.nbytes,
    )
