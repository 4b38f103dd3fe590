"""Predicts how many rows two ranks will exchange from counts both have seen.

Both ends allocate the same capacity without sending its size.

Shapes: G ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MEMORY = 7 / 8  # weight of a step relative to the one after it
FIRST_ROWS, FIRST_TOKENS = 1.0, 2.0  # prior of a pair of ranks: one of two tokens goes there
# Bytes that could travel during another round (latency x bandwidth): slow network, NVLink
ROUND_BYTES = {"cpu": 1 << 16, "cuda": 1 << 22}


@dataclass(frozen=True)
class Capacity:
    """Rows that fit into the chunk to each rank (`to`) and from each rank (`come`); 0 for the rank itself."""

    to: list[int]
    come: list[int]


def deviations(row_bytes: int, round_bytes: int) -> float:
    """Capacity beyond the expected rows, in standard deviations.

    row_bytes: size of a row. round_bytes: bytes that could travel during another round. Overflowing rows cost
    another round, and unused capacity costs bytes: wider rows get a smaller margin.
    """
    if 16 * row_bytes >= round_bytes:
        return 1.0
    return 2.0 if 64 * row_bytes >= round_bytes else 3.0


class CapacityEstimator:
    """Each rank's statistics of one request's dispatches; all ranks create a new one for the next request.

    It keeps, for every layer and pair of ranks, how many tokens the sender owned and how many of them it sent
    to the receiver; older steps count less. Both ends see both numbers in every exchange, and compute equal
    capacities: IEEE 754 rounds its additions, products, quotients and square roots alike on every machine.
    """

    def __init__(self, rank: int, num_ranks: int, round_bytes: int) -> None:
        self.rank = rank
        self.round_bytes = round_bytes
        self.of_layer: dict[int, Floats] = {}  # [rows or tokens, sent or received, the other rank]
        first = np.array([FIRST_ROWS, FIRST_TOKENS])[:, None, None]
        self.latest: Floats = np.broadcast_to(first, (2, 2, num_ranks))

    def capacity(self, layer: int, owned: Sequence[int], row_bytes: int) -> Capacity:
        """Predict the capacity of a layer's next dispatch, when rank r owns at most owned[r] tokens.

        A token goes to another rank at most once.
        """
        rows, tokens = self._seen(layer)
        share, most = rows / tokens, self._of_senders(owned)
        spare = deviations(row_bytes, self.round_bytes) * np.sqrt(most * share * (1 - share))
        capacity = np.ceil(most * share + spare)
        capacity = np.minimum(capacity, most).astype(np.int64)
        capacity[:, self.rank] = 0
        return Capacity(*capacity.tolist())

    def observe(self, layer: int, owned: Sequence[int], sent: Sequence[int], came: Sequence[int]) -> None:
        """Record the rows sent to each rank and received from each, when rank r owned owned[r] tokens."""
        new = np.stack([np.array([sent, came], np.float64), self._of_senders(owned)])
        self.latest = self.of_layer[layer] = MEMORY * self._seen(layer) + new

    def _seen(self, layer: int) -> Floats:
        """The statistics of a layer; a new layer starts like the latest one, with the weight of two
        tokens."""
        if layer in self.of_layer:
            return self.of_layer[layer]
        like_the_latest: Floats = self.latest * (FIRST_TOKENS / self.latest[1])
        return like_the_latest

    def _of_senders(self, owned: Sequence[int]) -> Floats:
        """Tokens that the sender owns [2, G]: row 0 for what this rank sends, row 1 for what it receives."""
        each = np.array(owned, np.float64)
        return np.stack([np.full_like(each, each[self.rank]), each])
