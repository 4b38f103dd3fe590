"""Arrays saved by numpy.save: the original ExFlow's trace, and vLLM's routed_experts of one request."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.arrays import ArrayStream, rows_in_a_block
from exflow.profiling.importers.dense import RoutedLayers
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording, parsing
from exflow.profiling.trace import DECODE

_REMEDY = "give an .npy of integers [tokens, layers], or [tokens, hidden layers, top_k] (numpy.save)"


def open_npy(paths: Sequence[Path], hints: Hints) -> Recording:
    """Each file is one sequence, for it knows none.

    Two dimensions, [tokens, layers]: the expert of a top-1 router, every layer a MoE layer (YJHMITWEB/ExFlow
    solve_affinity.py). Three, [tokens, hidden layers, top_k]: `CompletionOutput.routed_experts` of vLLM
    0.33.0 (vllm/outputs.py), where dense layers are zeros.

    Raises InputError for a damaged file, an object array, or another number of dimensions.
    """
    return Recording(lambda: _rows(paths, hints))


def _rows(paths: Sequence[Path], hints: Hints) -> Iterator[ForeignRows]:
    routed = RoutedLayers(hints.moe_layers)
    for number, path in enumerate(paths):
        with parsing(path, _REMEDY), path.open("rb") as file:
            stream = ArrayStream(file, path.stat().st_size)
            if len(stream.shape) not in (2, 3) or 0 in stream.shape:
                raise InputError(f"{path}: experts: shape is {stream.shape}; {_REMEDY}, none of them 0")
            if stream.dtype.kind not in "iu":
                raise InputError(f"{path}: experts: dtype is {stream.dtype}; give integers")
            start = 0
            for block in stream.blocks(rows_in_a_block(int(np.prod(stream.shape[1:])), stream.dtype)):
                yield _sequence_part(path, block, number, start, routed)
                start += len(block)
    routed.report()


def _sequence_part(path: Path, block: IntArray, number: int, start: int, routed: RoutedLayers) -> ForeignRows:
    position = np.arange(start, start + len(block))
    if block.ndim == 2:
        experts, layers, hidden = block[:, :, np.newaxis], tuple(range(block.shape[1])), None
    else:
        layers, kept = routed.split_zeros(path, block)
        experts, position, hidden = block[kept][:, list(layers)], position[kept], block.shape[1]
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
