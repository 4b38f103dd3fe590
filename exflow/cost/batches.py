"""Counts of the busiest rank in drawn batches of any size, for a plan on a trace.

They are the counts of `step_time`: the unevenness that skew and chance give a batch of this size.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from exflow.cost.workload import BatchCounts
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.serving import Serving
from exflow.placement.traffic.step_time import step_time
from exflow.profiling.trace import RoutingTrace

_WORK = 7_500_000  # choices in one batch of the largest size that is counted

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DrawnBatches:
    """Batches drawn from `trace`, run by `plan` under `strategy`. A size is counted once, when asked for."""

    plan: Plan
    trace: RoutingTrace
    strategy: Strategy
    _counted: list[Floats] = field(default_factory=list, init=False, repr=False)

    def of(self, tokens_per_rank: int) -> BatchCounts:
        """Counts for a batch of `tokens_per_rank` tokens on each rank.

        Powers of two are counted, and sizes between are interpolated as powers of the size, within about 2%.
        Above the largest size counted, loads grow in proportion. No load falls as the batch grows.
        """
        power = min(math.floor(math.log2(tokens_per_rank)), self._largest)
        loads, size = self._loads(power), 1 << power
        if size < tokens_per_rank and power < self._largest:
            share = math.log2(tokens_per_rank / size)
            loads, size = loads ** (1 - share) * self._loads(power + 1) ** share, tokens_per_rank
        return BatchCounts(float(loads[0]) / size, float(loads[1]) / size, float(loads[2]))

    @property
    def _largest(self) -> int:
        """Power of two of the largest size that is counted."""
        choices = self.plan.num_ranks * self.plan.num_layers * self.trace.top_k
        return math.floor(math.log2(max(1, _WORK // choices)))

    def _loads(self, power: int) -> Floats:
        """Rows of the busiest link, pairs of the busiest rank (over choices of a token), and experts read.

        All smaller sizes are counted too: chance lets no load fall below theirs.
        """
        while len(self._counted) <= power:
            size = 1 << len(self._counted)
            time = step_time(self.plan, self.trace, Serving(strategy=self.strategy.placed_for, batch=size))
            loads = np.array(
                [size * time.busiest_link_rows, size * time.compute_imbalance, time.experts_touched]
            )
            self._counted.append(np.maximum(loads, self._counted[-1]) if self._counted else loads)
        return self._counted[power]
