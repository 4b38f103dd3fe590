"""Pairwise exchange: all-to-alls between hosts over gloo, one sender to a host at a time.

gloo's own all-to-all has one connection for each pair of ranks, on which the two directions wait for each
other. It also starts all sends at once: packets that overflow a host's port are lost, and TCP repeats them
after 200 ms. Here each direction has a connection of its own. docs/decode.md has the figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

import torch.distributed as dist
from torch import Tensor

from exflow.job.cluster import Cluster, coherence_group

FEW_BYTES = 65536  # to all ranks together: a port can buffer so few bytes from all senders, without rounds


@dataclass(frozen=True)
class Chunks:
    """Bytes that one rank sends to each rank and receives from each (uint8); empty chunks are not sent."""

    to: list[Tensor]
    come: list[Tensor]


@dataclass(frozen=True)
class PairwiseExchange:
    """This rank's connections to the others: to ranks above it, and to ranks below.

    deferred: chunks that travel with the next exchange.
    """

    cluster: Cluster
    up: dist.ProcessGroup
    down: dist.ProcessGroup
    deferred: list[Chunks] = field(default_factory=list)

    @classmethod
    def between(cls, cluster: Cluster) -> Self | None:
        """Open the connections; None for a job on one host, or on another backend than gloo. Collective."""
        if cluster.num_nodes == 1 or cluster.device.type != "cpu":
            return None
        assert dist.group.WORLD is not None
        return cls(cluster, dist.group.WORLD, coherence_group(cluster, cluster.num_ranks).processes)

    def swap(self, chunks: Chunks) -> None:
        """Exchange `chunks` and the deferred ones. Collective."""
        self._exchange([chunks, *self.deferred])

    def defer(self, chunks: Chunks) -> None:
        """Exchange `chunks` together with the next ones: nobody needs them yet. Collective."""
        self.deferred.append(chunks)

    def finish(self) -> None:
        """Exchange the chunks that are still deferred. Collective."""
        if self.deferred:
            self._exchange(list(self.deferred))

    def _exchange(self, every: list[Chunks]) -> None:
        """Run the rounds: in round d a rank sends to the rank d above it and receives from the rank d below.

        Then each port has one sender at a time. A rank with few bytes does not wait for the end of a round.
        """
        self.deferred.clear()
        sent = sum(len(part) for each in every for part in each.to)
        heard = sum(len(part) for each in every for part in each.come)
        rounds = [self._start_round(distance, every) for distance in range(1, self.cluster.num_ranks)]
        for together in [chain(*rounds)] if max(sent, heard) <= FEW_BYTES else rounds:
            for work in list(together):
                work.wait()

    def _start_round(self, distance: int, every: list[Chunks]) -> Iterator[dist.Work]:
        """Yield the sends and receives of one round; each starts when it is yielded."""
        rank, ranks = self.cluster.rank, self.cluster.num_ranks
        above, below = (rank + distance) % ranks, (rank - distance) % ranks
        for chunks in every:
            if len(chunks.to[above]):
                yield self._way(rank, above).send([chunks.to[above]], above, 0)
            if len(chunks.come[below]):
                yield self._way(below, rank).recv([chunks.come[below]], below, 0)

    def _way(self, sender: int, receiver: int) -> dist.ProcessGroup:
        return self.up if receiver > sender else self.down
