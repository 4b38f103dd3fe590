"""Forward passes that several ranks recorded: each token once, and a sequence for each.

Under tensor parallelism all ranks see the same tokens and record them all; under data or expert parallelism
each sees its own. The files do not say which it was, the rows do.
"""

from collections.abc import Collection, Hashable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exflow.profiling.importers.foreign import ForeignRows, IntArray
from exflow.profiling.trace import DECODE

_CHUNK = 1 << 13  # rows hashed at a time


class SeenPasses:
    """Remembers 8 bytes a token of the passes of earlier ranks, if there are several files."""

    def __init__(self, num_files: int) -> None:
        self._needed = num_files > 1
        self._hashes: dict[Hashable, list[npt.NDArray[np.uint64]]] = {}

    def is_repeated(self, name: Hashable, experts: IntArray) -> bool:
        """True if `experts` [tokens, layers, top_k] repeat the rows given before under this name, up to the
        shorter length.

        One may go on where the other ends: SGLang cuts a batch that was gathered from all ranks to the
        length of each rank's own.
        """
        if not self._needed:
            return False
        hashes = _row_hashes(experts)
        earlier = self._hashes.setdefault(name, [])
        for other in earlier:
            both = min(len(other), len(hashes))
            if both and np.array_equal(other[:both], hashes[:both]):
                return True
        earlier.append(hashes)
        return False


class RowSequences:
    """Sequences for recordings that do not know them: row i of every pass of a rank is one.

    In a decode this is mostly true, since a request keeps its place in the batch.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, npt.NDArray[np.int64]] = {}
        self._passes: dict[Hashable, int] = {}
        self._next = 0

    def rows(self, path: Path, layers: Collection[int], experts: IntArray, num_bytes: int) -> ForeignRows:
        """The next pass of the rank whose file it is; experts [tokens, layers in ascending order, top_k]."""
        sequence, position = self.place(path, len(experts))
        return ForeignRows(
            path=path,
            layers=tuple(sorted(layers)),
            experts=experts,
            sequence=sequence,
            position=position,
            phase=np.full(len(experts), DECODE),
            num_bytes=num_bytes,
        )

    def place(self, rank: Hashable, tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sequence and position [tokens] of the rows of the rank's next pass."""
        numbers = self._numbers.get(rank, np.empty(0, np.int64))
        more = max(0, tokens - len(numbers))
        numbers = np.concatenate([numbers, np.arange(self._next, self._next + more)])
        self._next += more
        self._numbers[rank] = numbers
        position = self._passes.get(rank, 0)
        self._passes[rank] = position + 1
        return numbers[:tokens], np.full(tokens, position)


def _row_hashes(experts: IntArray) -> npt.NDArray[np.uint64]:
    """[tokens]: equal for equal rows; sums of ids times odd numbers, modulo 2^64."""
    rows = experts.reshape(len(experts), experts.shape[1] * experts.shape[2])
    factors = np.random.default_rng(0).integers(0, 1 << 63, rows.shape[1], dtype=np.uint64) * 2 + 1
    parts = [
        rows[start : start + _CHUNK].astype(np.uint64) @ factors for start in range(0, len(rows), _CHUNK)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)
