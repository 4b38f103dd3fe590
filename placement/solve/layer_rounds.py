"""Anneals the layers of a model beside each other, in two rounds, within a time limit.

Shapes: T tokens, L MoE layers, K = top_k.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from time import monotonic
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]
Tell = Callable[[str], None]
Found = TypeVar("Found")
SUM = 20  # (token, move) pairs that a term of a soft maximum takes as long as
_MOST_WORK = 10_000_000_000  # (token, move) pairs looked at in all layers: about half a minute on a core
_SHORT, _MOST_SHORT_WORK = 0.05, 500_000_000  # of a full round


def sampled(trace: RoutingTrace, most: int) -> IntArray:
    """[T, L, K]: the experts of `most` tokens at most, evenly over the trace."""
    experts = np.asarray(trace.experts)
    if len(experts) > most:
        experts = experts[np.linspace(0, len(experts) - 1, most).astype(np.int64)]
    return experts


def in_two_rounds(
    anneal_layer: Callable[[int, float, int], Found],
    found: list[Found],
    work: float,
    seed: int,
    time_limit: float,
    tell: Tell,
) -> None:
    """Anneal each layer in a short round, then in one that lasts as long as may be; results go to `found`.

    The first tells how long the second may be. Ctrl-C ends both: layers that were not reached keep what they
    had. anneal_layer: takes layer, share of a full round, seed. work: of a full round.
    """
    began = monotonic()
    short = min(_SHORT, _MOST_SHORT_WORK / work)
    if _round(lambda layer: anneal_layer(layer, short, seed), found, tell):
        return
    taken = monotonic() - began
    share = min(1.0, _MOST_WORK / work, (time_limit - taken) * short / max(taken, 1e-3))
    if share > short:
        _round(lambda layer: anneal_layer(layer, share, seed + 1), found, tell)


def _round(anneal_layer: Callable[[int], Found], found: list[Found], tell: Tell) -> bool:
    interrupted = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(anneal_layer, layer) for layer in range(len(found))]
        try:
            for layer, run in enumerate(runs):
                wait([run])
                tell(f"layer {layer + 1} of {len(runs)}")
        except KeyboardInterrupt:
            interrupted = True
            pool.shutdown(cancel_futures=True)
    for layer, run in enumerate(runs):
        if not run.cancelled():
            found[layer] = run.result()
    return interrupted
