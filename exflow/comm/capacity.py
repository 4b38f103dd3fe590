"""How many rows two ranks will exchange, as far as both of them know: what makes room without a word.

Shapes: G ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MEMORY = 7 / 8  # what a step counts against the one after it
FIRST_ROWS, FIRST_TOKENS = 1.0, 2.0  # of two tokens one: what is expected before anything is known
# What could travel while a pair makes another round: latency times bandwidth, of a slow network and of NVLink
ROUND_BYTES = {"cpu": 1 << 16, "cuda": 1 << 22}


@dataclass(frozen=True)
class Room:
    """Rows that the chunk to each rank has room for, and the one from each; none for a rank itself."""

    to: list[int]
    come: list[int]


def deviations(row_bytes: int, round_bytes: int) -> float:
    """How much more room there is than rows expected, in standard deviations.

    Rows beyond it cost another round, room without rows costs bytes: the wider a row, the less is spared.
    """
    if 16 * row_bytes >= round_bytes:
        return 1.0
    return 2.0 if 64 * row_bytes >= round_bytes else 3.0


class Expectation:
    """What every rank keeps of the dispatches of one request: create it anew, on all ranks, for the next.

    For every layer and pair of ranks: of the tokens that the sender owned, how many it sent to the receiver,
    older steps counting less. Both ends see both numbers in every exchange, so both come to the same room,
    whatever the others do: it is additions, products, quotients and square roots, which IEEE 754 rounds alike
    on every machine.
    """

    def __init__(self, rank: int, num_ranks: int, round_bytes: int) -> None:
        self.rank = rank
        self.round_bytes = round_bytes
        self.of_layer: dict[int, Floats] = {}  # [rows or tokens, out or in, the other rank]
        first = np.array([FIRST_ROWS, FIRST_TOKENS])[:, None, None]
        self.latest: Floats = np.broadcast_to(first, (2, 2, num_ranks))

    def room(self, layer: int, owned: Sequence[int], row_bytes: int) -> Room:
        """The room for the next dispatch of a layer, of which rank r owns at most owned[r] tokens.

        A token goes to another rank once at most.
        """
        rows, tokens = self._seen(layer)
        share, most = rows / tokens, self._of_senders(owned)
        spare = deviations(row_bytes, self.round_bytes) * np.sqrt(most * share * (1 - share))
        room = np.ceil(most * share + spare)
        room = np.minimum(room, most).astype(np.int64)
        room[:, self.rank] = 0
        return Room(*room.tolist())

    def observe(self, layer: int, owned: Sequence[int], sent: Sequence[int], came: Sequence[int]) -> None:
        """Take in how many rows went to each rank, and came from each, where rank r owned owned[r] tokens."""
        new = np.stack([np.array([sent, came], np.float64), self._of_senders(owned)])
        self.latest = self.of_layer[layer] = MEMORY * self._seen(layer) + new

    def _seen(self, layer: int) -> Floats:
        """A layer never seen is taken to be like the latest one, with the weight of the first two tokens."""
        if layer in self.of_layer:
            return self.of_layer[layer]
        like_the_latest: Floats = self.latest * (FIRST_TOKENS / self.latest[1])
        return like_the_latest

    def _of_senders(self, owned: Sequence[int]) -> Floats:
        """[2, G] the tokens of whoever sends: this rank in what goes out, the other one in what comes in."""
        each = np.array(owned, np.float64)
        return np.stack([np.full_like(each, each[self.rank]), each])
