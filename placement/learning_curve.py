"""Tells whether enough tokens were profiled: plans from growing parts of a trace, judged on held-out ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exflow.errors import InputError
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.confidence import interval, split_by_sequence
from exflow.placement.traffic.evaluate import own_figures
from exflow.profiling.merge import of_sequences
from exflow.profiling.trace import RoutingTrace

_SMALL_GAIN = 0.005  # of the messages: a doubling that brings less is not worth profiling for
_SMALL_GAP = 0.03  # of the messages: a plan that does as well on new tokens has learned no accidents
_SLOWEST = 0.9  # shrinking of gains from one doubling to the next: so that their sum stays finite


@dataclass(frozen=True)
class Point:
    """A plan made from some tokens: messages of its strategy per token and layer."""

    tokens: int
    sequences: int
    on_its_own: float  # on the tokens that it was made from
    held_out: float  # on the held-out ones, the same for all points ...
    low: float  # ... with an interval
    high: float

    @property
    def gap(self) -> float:
        """(held-out - own) / held-out messages: how much less the plan sends on its own tokens."""
        return 1 - self.on_its_own / self.held_out if self.held_out else 0.0


def learning_curve(
    trace: RoutingTrace,
    topology: Topology,
    *,
    objective: Objective,
    solving: Solving,
    share: float = 0.25,
    points: int = 6,
    redundant_experts: int = 0,
    tell: Callable[[int], None] = lambda tokens: None,
) -> list[Point]:
    """A point for the whole trace but a held-out share, and for a half, a quarter, ... of its sequences.

    The sequences are taken in an order that is drawn by the seed, so that a half is like the whole. Each
    point has its own solve, and an equal share of the time limit (seconds). `tell` is told the tokens of
    each as its turn comes. Points in ascending order of tokens; those without a sequence, or with too few
    tokens to keep the cap on imbalance, are left out. Raises InputError as `split_by_sequence` and `place`
    do.
    """
    if points < 1:
        raise InputError(f"points of the learning curve are {points}; choose 1 or more, say 6")
    train, held_out = split_by_sequence(trace, share)
    order = np.random.default_rng(solving.seed).permutation(len(np.unique(train.sequence)))
    sizes = [len(order) >> halvings for halvings in reversed(range(points)) if len(order) >> halvings]
    equal = replace(solving, time_limit=solving.time_limit / len(sizes))
    curve = []
    for size in sizes:
        part = of_sequences(train, order[:size])
        tell(part.num_tokens)
        try:
            plan = place(
                part, topology, objective=objective, solving=equal, redundant_experts=redundant_experts
            )
        except InputError:
            if size == len(order):
                raise
            continue  # a cap that more tokens may keep; anything else the whole raises too
        curve.append(_point(plan, part, size, held_out))
    return curve


def verdict(points: Sequence[Point]) -> str:
    """One sentence: whether enough tokens were profiled, by which figures, and what more tokens may bring.

    Tokens are enough where the last doubling brought under 0.5%, or less than half the interval's width
    (which is chance), and the plan does about as well on held-out tokens as on its own.
    """
    if len(points) < 2:
        return (
            "Cannot say whether enough tokens were profiled: too few sequences for two points; profile more."
        )
    before, last = points[-2:]
    gained = before.held_out - last.held_out
    small = gained < _SMALL_GAIN * before.held_out
    unclear = not small and gained < (last.high - last.low) / 2
    enough = (small or unclear or not last.held_out) and last.gap < _SMALL_GAP
    facts = (
        f"going from {before.tokens:,} to {last.tokens:,} tokens {_changed(before, last)} on held-out "
        f"sequences (now {last.held_out:.3f} a token and layer, {last.low:.3f} to {last.high:.3f})"
        f"{', no more than chance may bring,' if unclear else ''} and the plan sends {_gap(last)} "
        f"on its own tokens ({last.on_its_own:.3f})"
    )
    if enough:
        return f"Enough tokens were profiled: {facts}."
    return f"More tokens may help: {facts}; {_outlook(points)}."


def _point(plan: Plan, part: RoutingTrace, sequences: int, held_out: RoutingTrace) -> Point:
    own = own_figures(plan)["messages_per_token_layer"]
    judged = interval(plan, held_out)["messages_per_token_layer"]
    return Point(part.num_tokens, sequences, own, judged["value"], judged["low"], judged["high"])


def _changed(before: Point, last: Point) -> str:
    change = last.held_out / before.held_out - 1 if before.held_out else 0.0
    return f"brought {abs(change):.1%} {'more' if change > 0 else 'fewer'} messages"


def _gap(last: Point) -> str:
    return f"{abs(last.gap):.1%} {'more' if last.gap < 0 else 'fewer'}"


def _outlook(points: Sequence[Point]) -> str:
    """A sentence on what more tokens may bring, if gains keep shrinking from one doubling to the next.

    With endless tokens own and held-out messages are the same, and lie between those of now: the former
    grow, the latter fall. So the gap, to the far end of the interval, bounds what is to be gained.
    """
    last = points[-1]
    bound = max(1 - last.on_its_own / last.high, 0.0)
    gains = -np.diff([point.held_out for point in points[-3:]])
    if bound == 0:
        return "yet the figure on its own tokens leaves nothing to be gained, so more may bring little"
    if len(gains) < 2 or gains[-1] <= 0 or gains[-2] <= 0:
        return f"how much cannot be told from these points, but hardly over {bound:.1%} fewer messages"
    shrinking = min(gains[-1] / gains[-2], _SLOWEST)
    one = shrinking * gains[-1] / last.held_out
    endless = one / (1 - shrinking)
    return (
        f"if the gains go on as over the last two steps, twice the tokens may bring about "
        f"{min(one, bound):.1%} fewer, and any number about {min(endless, bound):.1%}"
    )
