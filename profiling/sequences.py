"""Sequence ids of a trace, whatever ids the engine uses."""

from typing import Any

import numpy as np
import numpy.typing as npt

PADDING = -1  # the sequence of a row that is no token: it is not recorded
_UNSEEN = (0, np.iinfo(np.int64).max)  # a number to be replaced, and a position that nothing passes


class SequenceNumbers:
    """Numbers sequences 0, 1, 2, ... in order of first appearance.

    An engine starts again at sequence 0 with every call; in a trace that would look like one sequence that
    jumps back. So an id whose position does not advance begins a new sequence.

    Example: sequence [3, 8, 3, 3, 8] at position [0, 0, 1, 0, 1] -> [0, 1, 0, 2, 1].
    """

    def __init__(self) -> None:
        self._latest: dict[int, tuple[int, int]] = {}  # engine's id -> its number now, its last position
        self._next = 0

    def renumber(self, sequence: npt.NDArray[Any], position: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """The numbers [rows] of at least one row, which follow the rows of earlier calls."""
        order = np.argsort(sequence, kind="stable")  # the rows of one id together, in order of time
        ids, places = sequence[order], position[order]
        heads = np.flatnonzero(np.diff(ids, prepend=~ids[:1]))  # where the next id begins
        number = np.zeros(len(ids), np.int64)
        before = np.concatenate([places[:1], places[:-1]]).astype(np.int64)
        latest = [self._latest.get(engine_id, _UNSEEN) for engine_id in ids[heads].tolist()]
        number[heads], before[heads] = np.array(latest).T

        begins = np.flatnonzero(places <= before)
        number[begins[np.argsort(order[begins])]] = self._next + np.arange(len(begins))
        self._next += len(begins)
        known = np.union1d(heads, begins)  # the other rows have the number of the row before
        number = np.repeat(number[known], np.diff(known, append=len(ids)))

        tails = np.append(heads[1:], len(ids)) - 1
        last = zip(number[tails].tolist(), places[tails].tolist(), strict=True)
        self._latest.update(zip(ids[tails].tolist(), last, strict=True))
        numbers = np.empty(len(ids), np.int32)
        numbers[order] = number
        return numbers


def consecutive_rows(
    sequence: npt.NDArray[np.integer],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of a trace, and for each the next row of its sequence; a sequence's last row is left out.

    `sequence` is [T], the sequences in any order and interleaved at will: (0, 1, 0) gives (0,) and (2,).
    """
    order = np.argsort(sequence, kind="stable")
    row, next_row = order[:-1], order[1:]
    same = sequence[row] == sequence[next_row]
    return row[same], next_row[same]
