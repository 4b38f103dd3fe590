"""Confidence in the figures of a plan: held-out sequences, and intervals by the bootstrap.

A trace is a sample. Its tokens are not independent, since those of one sequence are on one subject and
follow one another; its sequences are taken to be. So whole sequences are held out, and whole sequences are
drawn anew for the intervals (the bootstrap of clusters; Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapters 8, 13).

Shapes: B blocks of sequences, D draws, L MoE layers, G ranks.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.solve.baselines import contiguous_plan
from exflow.placement.traffic.traffic import follow
from exflow.profiling.merge import of_sequences
from exflow.profiling.trace import RoutingTrace

_MOST_BLOCKS = 128  # so that loads by block stay small; more blocks would hardly change an interval
_FINEST_SHARE = 10**6  # the largest denominator of a share: makes 0.1 a tenth, and 0.333... a third

Draws = npt.NDArray[np.float64]  # [1 + D, ...]: on the trace as it is, then on each trace drawn from it
Bounds = dict[str, float]  # value, low, high


@dataclass(frozen=True, eq=False)
class Blocks:
    """Traffic of a plan on a trace, by block of sequences; the bootstrap draws blocks anew."""

    sequences: int
    tokens: npt.NDArray[np.int64]  # [B]
    messages: npt.NDArray[np.int64]  # [B]
    inter_node: npt.NDArray[np.int64]  # [B] those of the messages that go to another node
    load: npt.NDArray[np.int64]  # [B, L, G]


def split_by_sequence(trace: RoutingTrace, share: float) -> tuple[RoutingTrace, RoutingTrace]:
    """The trace without a share of its sequences, and these: to place on, and to judge the plan by.

    The held-out sequences are spread evenly over all of them in ascending order of id: every fourth of a
    quarter. Both parts number their sequences anew, 0, 1, ... in the same order: a sequence's home is its
    number modulo the ranks, and every fourth sequence would be at home on one rank of four. Raises
    InputError unless the share is between 0 and 1 and leaves sequences on both sides.
    """
    ids = np.unique(trace.sequence)
    if not 1 / _FINEST_SHARE <= share <= 1 - 1 / _FINEST_SHARE:
        raise InputError(
            f"held-out share is {share}, of {len(ids)} sequences; choose a number between 0 and 1, say 0.25"
        )
    exact = Fraction(share).limit_denominator(_FINEST_SHARE)
    held_before = np.arange(len(ids) + 1) * exact.numerator // exact.denominator
    held_out = np.diff(held_before).astype(bool)
    if not held_out.any():  # never all of them, of a share below 1
        raise InputError(
            f"held-out share is {share}, but the trace has {len(ids)} sequence(s), too few to split so; "
            f"record {math.ceil(1 / exact)} at least, or choose a larger share"
        )
    return of_sequences(trace, np.flatnonzero(~held_out)), of_sequences(trace, np.flatnonzero(held_out))


def interval(
    plan: Plan, trace: RoutingTrace, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Figures of the plan's own strategy on the trace, each with an interval; ready for JSON.

    "messages_per_token_layer", "inter_node" (the part of them between nodes, where there are several) and
    "imbalance" (the mean over layers of the busiest rank's load over the mean load) are each a "value" on
    the trace and the "low" and "high" ends of an interval that holds the figure of endless tokens of the
    same kind with probability `level`, about. "sequences" says how many there were to draw from; from fewer
    than 8 an interval says little, and is rather too narrow.

    Each draw takes as many blocks of sequences, with replacement, as there are; a block is one sequence, or
    several where there are more than 128. Raises InputError if the trace is empty or of another model than
    the plan.
    """
    blocks = _follow_blocks(plan, trace)
    times = _draw(len(blocks.tokens), draws, level, seed)
    return {"sequences": blocks.sequences, "level": level, **_figures(plan, blocks, times, level)}


def held_out_figures(
    plan: Plan,
    held_out: RoutingTrace,
    train: RoutingTrace,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of `interval` on tokens that the plan, placed on `train`, was not made from; ready for
    JSON.

    Also "tokens"; "contiguous", the messages per token and layer of the contiguous plan on the same tokens;
    and "ratio_to_contiguous", the plan's messages over those, or None where those are 0. The interval of
    the ratio is paired: both plans follow the same drawn sequences, so what is hard about these cancels
    out.
    """
    blocks = _follow_blocks(plan, held_out)
    contiguous = _follow_blocks(
        contiguous_plan(train, plan.topology, plan.strategy, plan.num_slots), held_out
    )
    times = _draw(len(blocks.tokens), draws, level, seed)
    ours, theirs = times @ blocks.messages, times @ contiguous.messages
    return {
        "tokens": held_out.num_tokens,
        "sequences": blocks.sequences,
        "level": level,
        **_figures(plan, blocks, times, level),
        "contiguous": _percentiles(_per_token_layer(contiguous.messages, contiguous, times), level),
        "ratio_to_contiguous": _percentiles(_quotients(ours, theirs), level) if theirs[0] else None,
    }


def ratio(
    ours: npt.NDArray[np.integer],
    theirs: npt.NDArray[np.integer],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Bounds:
    """The sum of ours over the sum of theirs, each [N] by sequence, with an interval as in `interval`.

    Paired: both are of the same drawn sequences. Theirs must not all be 0.
    """
    times = _draw(len(ours), draws, level, seed)
    return _percentiles(_quotients(times @ ours, times @ theirs), level)


def _follow_blocks(plan: Plan, trace: RoutingTrace) -> Blocks:
    if not trace.num_tokens:
        raise InputError("the trace has no tokens to judge the plan by; choose one that has")
    num_blocks = min(len(np.unique(trace.sequence)), _MOST_BLOCKS)
    followed = follow(trace, plan, plan.group_size, blocks=num_blocks)

    def by_block(of_sequence: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        sums = np.zeros(num_blocks, dtype=np.int64)
        np.add.at(sums, followed.block, of_sequence)
        return sums

    return Blocks(
        sequences=len(followed.tokens),
        tokens=by_block(followed.tokens),
        messages=by_block(followed.messages.sum(axis=(1, 2))),
        inter_node=by_block(followed.messages[:, :, 1].sum(axis=1)),
        load=followed.load,
    )


def _draw(num_blocks: int, draws: int, level: float, seed: int) -> Draws:
    """[1 + D, B] how many times each block counts: once in the trace as it is, then in each draw."""
    if draws < 1:
        raise InputError(f"draws is {draws}; choose 1 or more, say 1000")
    if not 0 < level < 1:
        raise InputError(f"level is {level}; choose a number between 0 and 1, say 0.95")
    drawn = np.random.default_rng(seed).multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), draws)
    return np.concatenate([np.ones((1, num_blocks)), drawn])


def _figures(plan: Plan, blocks: Blocks, times: Draws, level: float) -> dict[str, Bounds]:
    figures = {
        "messages_per_token_layer": _percentiles(_per_token_layer(blocks.messages, blocks, times), level)
    }
    if plan.topology.num_nodes > 1:
        figures["inter_node"] = _percentiles(_per_token_layer(blocks.inter_node, blocks, times), level)
    return figures | {"imbalance": _both_ways(_imbalance(blocks, times), level)}


def _per_token_layer(messages: npt.NDArray[np.int64], blocks: Blocks, times: Draws) -> Draws:
    return np.asarray(times @ messages / (times @ blocks.tokens * blocks.load.shape[1]))


def _imbalance(blocks: Blocks, times: Draws) -> Draws:
    """[1 + D] means over layers of `imbalance_of`, layer by layer: all draws' loads would take memory."""
    layers = blocks.load.astype(np.float64).transpose(1, 0, 2)  # products of floats are quick, and exact here
    mean_load = times @ blocks.load[:, 0].sum(axis=1) / blocks.load.shape[2]  # the same in every layer
    busiest = np.stack([(times @ load).max(axis=1) for load in layers])
    return np.asarray((busiest / mean_load).mean(axis=0))


def _quotients(ours: Draws, theirs: Draws) -> Draws:
    """Quotients of the draws, without the draws whose denominator is 0."""
    return np.asarray(ours[theirs > 0] / theirs[theirs > 0])


def _percentiles(drawn: Draws, level: float) -> Bounds:
    """The middle `level` of the draws, and the value, which a few draws may miss."""
    value, low, high = _quantiles(drawn, level)
    return {"value": value, "low": min(low, value), "high": max(high, value)}


def _both_ways(drawn: Draws, level: float) -> Bounds:
    """The interval that covers the percentiles and these mirrored at the value (basic bootstrap), from 1 up.

    The busiest of several ranks looks busier the fewer the tokens, so the trace exceeds the truth about as a
    draw exceeds the trace. Percentiles alone would add to that error, and miss level loads always; mirrored
    alone, they miss too often where a few ranks are about equally busy.
    """
    value, low, high = _quantiles(drawn, level)
    return {
        "value": value,
        "low": min(max(2 * value - high, 1.0), low, value),
        "high": max(2 * value - low, high, value),
    }


def _quantiles(drawn: Draws, level: float) -> tuple[float, float, float]:
    after = drawn[1:] if len(drawn) > 1 else drawn  # of quotients there may be none
    low, high = np.quantile(after, [(1 - level) / 2, (1 + level) / 2])
    return float(drawn[0]), float(low), float(high)
