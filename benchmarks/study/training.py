"""Affinity, routing entropy and load balance while a model is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.study.data import FINAL, Checkpoint, folds, without
from benchmarks.study.figures import Panel, Series, curves, markdown, span
from benchmarks.study.information import information
from exflow.placement.counts.affinity import count_affinity
from exflow.placement.counts.information import entropy
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.confidence import Bounds, ratio
from exflow.placement.traffic.traffic import imbalance_of, local_fraction
from exflow.profiling.merge import of_sequences
from exflow.profiling.trace import RoutingTrace

FOLDS = 4
FOUR = Topology(gpus_per_node=4)
CROSSINGS = Objective(balance_price=0)  # the paper's: as few tokens as can be change their GPU
SOLVING = Solving("sweep")  # there are many to solve, and what counts is how they compare


@dataclass(frozen=True)
class Step:
    """A checkpoint. Means over layers, or over pairs of adjacent layers.

    imbalance  the busiest expert's load over the mean load
    entropy    bits, of the experts' loads; log2 of the experts if all are used alike
    bits       said about the next layer's expert, less what a shuffled control says; error: standard error
    topic      the part of bits that a shuffle inside each sequence leaves: what its text as a whole says
    share      bits over the entropy of the next layer
    local      share of the transitions that stay on one of four GPUs, placed by affinity; of sequences that
               the placement has not seen
    by_load    the same of routing whose layers were shuffled over the tokens: loads alone do this
    contiguous the same of the contiguous placement
    """

    step: str
    tokens: int
    sequences: int
    imbalance: float
    entropy: float
    bits: float
    error: float
    topic: float
    share: float
    local: Bounds
    by_load: Bounds
    contiguous: Bounds


def measure(steps: Sequence[Checkpoint], tell: Callable[[str], None]) -> list[Step]:
    return [_measure(each, tell) for each in steps]


def _measure(checkpoint: Checkpoint, tell: Callable[[str], None]) -> Step:
    tell(f"step {checkpoint.step}")
    trace = checkpoint.trace
    said, load = information(trace), count_affinity(trace).load
    return Step(
        step=checkpoint.step,
        tokens=trace.num_tokens,
        sequences=len(np.unique(trace.sequence)),
        imbalance=float(imbalance_of(load).mean()),
        entropy=float(entropy(load).mean()),
        bits=said.net,
        error=said.error,
        topic=said.of_topic,
        share=said.share,
        local=local_share(trace, SOLVING),
        by_load=local_share(shuffled_layers(trace), SOLVING),
        contiguous=local_share(trace, Solving("contiguous")),
    )


def local_share(trace: RoutingTrace, solving: Solving) -> Bounds:
    """Share of adjacent-layer transitions that stay on a GPU; every sequence under a plan made without it."""
    shares, sizes = [], []
    for part in folds(trace, FOLDS):
        plan = place(without(trace, part), FOUR, objective=CROSSINGS, solving=solving)
        for number in part:
            sequence = of_sequences(trace, np.array([number]))
            shares.append(round(local_fraction(sequence, plan).sum() * sequence.num_tokens))
            sizes.append(sequence.num_tokens * (trace.num_layers - 1))
    return ratio(np.array(shares), np.array(sizes))


def shuffled_layers(trace: RoutingTrace, seed: int = 0) -> RoutingTrace:
    """Each layer's choices in another order of tokens: the same loads, and no affinity."""
    random = np.random.default_rng(seed)
    layers = [random.permutation(trace.experts[:, layer]) for layer in range(trace.num_layers)]
    return replace(trace, experts=np.stack(layers, axis=1))


def table(rows: list[Step]) -> str:
    headings = [
        "step",
        "busiest expert over mean",
        "entropy, bits",
        "net information, bits",
        "of it by the sequence",
        "of the entropy",
        "stays on its GPU",
        "by loads alone",
        "contiguous",
    ]
    lines = [
        [
            each.step,
            f"{each.imbalance:.2f}",
            f"{each.entropy:.2f}",
            f"{each.bits:.3f} ± {1.96 * each.error:.3f}",
            f"{each.topic:.3f}",
            f"{each.share:.1%}",
            span(each.local),
            span(each.by_load),
            f"{each.contiguous['value']:.3f}",
        ]
        for each in rows
    ]
    return markdown(headings, lines)


def figure(rows: list[Step]) -> str:
    """The drawing of the checkpoints of one text, hence without the final model."""
    rows = [each for each in rows if each.step != FINAL]
    x, labels = list(range(len(rows))), [each.step for each in rows]

    def series(name: str, colour: int, which: str) -> Series:
        value, low, high = ([getattr(each, which)[end] for each in rows] for end in ("value", "low", "high"))
        return Series(name, colour, x, value, low, high)

    stays = [
        series("stays, placed by affinity", 1, "local"),
        series("stays, by loads alone", 3, "by_load"),
        series("stays, contiguous", 0, "contiguous"),
    ]
    bits = [
        Series("entropy of the routing", 4, x, [each.entropy for each in rows]),
        Series("net information about the next layer", 2, x, [each.bits for each in rows]),
        Series("what the sequence says of it", 3, x, [each.topic for each in rows]),
    ]
    busiest = [Series("busiest expert over the mean", 0, x, [each.imbalance for each in rows])]
    return curves(
        "Affinity, entropy and balance of a model in training",
        [
            Panel("step", "share that stays on its GPU", stays, labels),
            Panel("step", "bits", bits, labels),
            Panel("step", "load over mean load", busiest, labels),
        ],
    )
