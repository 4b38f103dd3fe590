"""Assigns tokens of successive forward passes to requests, by their positions alone."""

from collections import deque
from collections.abc import Iterator, Sequence


class RequestTracker:
    """Follows the requests of one rank through its passes.

    A piece of a request that begins at position p goes on with the request that stopped before p: the one
    that ran last, and of several that ran in one pass the first that is left, for requests keep their order
    in the batch. A piece at 0, or one that nothing leads to, begins a sequence.

    Example: pieces (0, 3), (0, 3), then (3, 1), (3, 1) -> sequences 0, 1, then 0, 1.
    """

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers  # those of new sequences, shared by the ranks
        self._waiting: dict[int, list[deque[int]]] = {}  # by next position; a queue a pass

    def follow(self, pieces: Sequence[tuple[int, int]]) -> list[int]:
        """The sequence of each piece (first position, tokens) of one pass."""
        numbers = [self._take(first) for first, _ in pieces]
        stopped: dict[int, deque[int]] = {}
        for (first, tokens), number in zip(pieces, numbers, strict=True):
            stopped.setdefault(first + tokens, deque()).append(number)
        for position, queue in stopped.items():
            self._waiting.setdefault(position, []).append(queue)
        return numbers

    def _take(self, position: int) -> int:
        queues = self._waiting.get(position)
        if not queues:
            return next(self._numbers)
        number = queues[-1].popleft()
        if not queues[-1]:
            queues.pop()
        return number
