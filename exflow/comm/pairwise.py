"""All-to-alls between hosts over gloo: a connection for each direction, and one sender to a host at a time.

gloo's own all-to-all has one connection for each pair of ranks, where what goes one way waits for what goes
the other, and starts all sends at once: what a host's port has no room for is lost, and TCP sends it again
after 200 ms. docs/decode.md has the figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

import torch.distributed as dist
from torch import Tensor

from exflow.job.cluster import Cluster, coherence_group

FEW_BYTES = 65536  # for all others: any port has room for as many of every rank, and rounds would take longer


@dataclass(frozen=True)
class Parcels:
    """What one rank gives to each, and gets from each: both by rank, uint8; what is empty is not sent."""

    to: list[Tensor]
    come: list[Tensor]


@dataclass(frozen=True)
class Rounds:
    """This rank's connections to the others: to ranks above it, and to ranks below.

    deferred: parcels that go with those of the next exchange.
    """

    cluster: Cluster
    up: dist.ProcessGroup
    down: dist.ProcessGroup
    deferred: list[Parcels] = field(default_factory=list)

    @classmethod
    def between(cls, cluster: Cluster) -> Self | None:
        """None where there is one host, or another backend than gloo. Collective."""
        if cluster.num_nodes == 1 or cluster.device.type != "cpu":
            return None
        assert dist.group.WORLD is not None
        return cls(cluster, dist.group.WORLD, coherence_group(cluster, cluster.num_ranks).processes)

    def swap(self, parcels: Parcels) -> None:
        """Exchange these parcels, and the deferred ones. Collective."""
        self._exchange([parcels, *self.deferred])

    def defer(self, parcels: Parcels) -> None:
        """Exchange them when there is occasion: nobody needs them yet. Collective."""
        self.deferred.append(parcels)

    def finish(self) -> None:
        """Exchange what is still deferred. Collective."""
        if self.deferred:
            self._exchange(list(self.deferred))

    def _exchange(self, every: list[Parcels]) -> None:
        """In round d all send to the rank d above and hear the one d below, so that each port has one sender.

        Who has little to send and to hear does not wait for a round's end.
        """
        self.deferred.clear()
        sent = sum(len(part) for each in every for part in each.to)
        heard = sum(len(part) for each in every for part in each.come)
        rounds = [self._start_round(distance, every) for distance in range(1, self.cluster.num_ranks)]
        for together in [chain(*rounds)] if max(sent, heard) <= FEW_BYTES else rounds:
            for work in list(together):
                work.wait()

    def _start_round(self, distance: int, every: list[Parcels]) -> Iterator[dist.Work]:
        """Begins each send and receipt as it is asked for."""
        rank, ranks = self.cluster.rank, self.cluster.num_ranks
        above, below = (rank + distance) % ranks, (rank - distance) % ranks
        for parcels in every:
            if len(parcels.to[above]):
                yield self._way(rank, above).send([parcels.to[above]], above, 0)
            if len(parcels.come[below]):
                yield self._way(below, rank).recv([parcels.come[below]], below, 0)

    def _way(self, sender: int, receiver: int) -> dist.ProcessGroup:
        return self.up if receiver > sender else self.down
