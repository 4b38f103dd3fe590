"""Sequence numbers of a trace from the ids of an engine."""

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from exflow.profiling.sequences import SequenceNumbers


def test_the_example_of_the_docstring() -> None:
    numbers = SequenceNumbers()
    assert numbers.renumber(np.array([3, 8, 3, 3, 8]), np.array([0, 0, 1, 0, 1])).tolist() == [0, 1, 0, 2, 1]
    assert numbers.renumber(np.array([3, 8, 3]), np.array([1, 0, 2])).tolist() == [2, 3, 2]


def one_by_one(rows: list[tuple[int, int]]) -> list[int]:
    """The rule itself, a row at a time."""
    number: dict[int, int] = {}
    last: dict[int, int] = {}
    numbers, begun = [], 0
    for sequence, position in rows:
        if sequence not in number or position <= last[sequence]:
            number[sequence] = begun
            begun += 1
        last[sequence] = position
        numbers.append(number[sequence])
    return numbers


@given(st.lists(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 5)), min_size=1), max_size=4))
def test_blocks_are_numbered_as_row_by_row(blocks: list[list[tuple[int, int]]]) -> None:
    numbers = SequenceNumbers()
    found = [numbers.renumber(*np.array(block).T).tolist() for block in blocks]
    assert list(chain(*found)) == one_by_one(list(chain(*blocks)))
