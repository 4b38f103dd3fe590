"""Information of a token's expert in one layer on its expert in a later one, beside chance and topic.

Shapes: T tokens, L MoE layers, E experts, B blocks of sequences. Of top-k routing the first choice counts.
"""

from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.counts.information import entropy, mutual_information
from exflow.profiling.trace import RoutingTrace

BLOCKS = 20  # at most
SHUFFLES = 5

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Information:
    """Figures in bits, for each pair of layers at one distance.

    entropy  of the later layer's expert: the most that can be said about it
    plug_in  mutual information as counted
    chance   the same, after the later layer's experts were shuffled over all tokens: the estimate's bias
             (of dependent layers it is somewhat less: fewer pairs of experts occur)
    topic    the same, shuffled inside each sequence: chance, and what a sequence's mixture of experts says
             (a little more than that: a short sequence shuffled is still much like itself)
    error    standard error of the mean of plug_in, by the jackknife over blocks of sequences
    """

    distance: int
    entropy: list[float]
    plug_in: list[float]
    chance: list[float]
    topic: list[float]
    error: float

    @property
    def net(self) -> float:
        """The mean over pairs of layers, less what chance says."""
        return fmean(self.plug_in) - fmean(self.chance)

    @property
    def share(self) -> float:
        """`net` as a share of the later layers' entropy."""
        return self.net / fmean(self.entropy) if any(self.entropy) else 0.0

    @property
    def of_topic(self) -> float:
        """The mean of what the sequence alone says, less what chance says."""
        return fmean(self.topic) - fmean(self.chance)


def information(trace: RoutingTrace, distance: int = 1, seed: int = 0) -> Information:
    """Information between each layer and the layer `distance` later.

    Raises InputError where the trace has no such pair of layers, or a single sequence.
    """
    if not 1 <= distance < trace.num_layers:
        raise InputError(
            f"distance is {distance}, of a trace with {trace.num_layers} MoE layers; "
            f"choose 1 to {trace.num_layers - 1}"
        )
    if len(np.unique(trace.sequence)) < 2:
        raise InputError("the trace is of one sequence, which says nothing of others; give one of 20 or more")
    first, random = trace.experts[:, :, 0].astype(np.int64), np.random.default_rng(seed)
    _, sequence = np.unique(trace.sequence, return_inverse=True)
    block = sequence % BLOCKS
    columns: dict[str, list[float]] = {name: [] for name in ("entropy", "plug_in", "chance", "topic")}
    without = []  # [pairs, B] plug-in estimates without one block
    for layer in range(trace.num_layers - distance):
        here, after = first[:, layer], first[:, layer + distance]
        by_block = _joint(here, after, block, trace.num_experts)
        joint = by_block.sum(axis=0)
        without.append(mutual_information(joint - by_block))
        shuffled = [random.permutation(after) for _ in range(SHUFFLES)]
        inside = [_shuffled_inside(after, sequence, random) for _ in range(SHUFFLES)]
        columns["entropy"].append(float(entropy(joint.sum(axis=0))))
        columns["plug_in"].append(float(mutual_information(joint)))
        columns["chance"].append(_mean_information(here, shuffled, trace.num_experts))
        columns["topic"].append(_mean_information(here, inside, trace.num_experts))
    return Information(distance, **columns, error=_jackknife(np.mean(without, axis=0)))


def _joint(here: Integers, after: Integers, block: Integers, experts: int) -> npt.NDArray[np.int64]:
    """[B, E, E] how often two experts occur together, by block of sequences."""
    blocks = int(block.max()) + 1
    cell = (block * experts + here) * experts + after
    return np.bincount(cell, minlength=blocks * experts**2).reshape(blocks, experts, experts)


def _shuffled_inside(after: Integers, sequence: Integers, random: np.random.Generator) -> Integers:
    """Each sequence's experts in an order of chance."""
    shuffled = np.empty_like(after)
    order = np.lexsort((random.random(len(after)), sequence))
    shuffled[np.argsort(sequence, kind="stable")] = after[order]
    return shuffled


def _mean_information(here: Integers, afters: list[Integers], experts: int) -> float:
    whole = np.zeros_like(here)
    return fmean(float(mutual_information(_joint(here, after, whole, experts)[0])) for after in afters)


def _jackknife(without: npt.NDArray[np.float64]) -> float:
    """Standard error, from the estimates without one block each (Efron and Tibshirani, 1993, chapter 11)."""
    return float(np.sqrt((len(without) - 1) * np.var(without)))
