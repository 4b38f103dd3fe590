"""Affinity between layers that are not neighbours: information of an expert on one some layers later."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from benchmarks.study.data import Subject
from benchmarks.study.figures import Panel, Series, curves, markdown
from benchmarks.study.information import information

SHOWN = (1, 2, 3, 4, 8, 16)  # in the table; the figure has all


@dataclass(frozen=True)
class Distance:
    """Means over the pairs of layers at one distance.

    bits         said about the later layer's expert, less what a shuffled control says
    error        the standard error of bits
    share        bits over the later layers' entropy
    to_adjacent  bits over the bits of the layers just before the later layers
    """

    model: str
    distance: int
    pairs: int
    bits: float
    error: float
    share: float
    to_adjacent: float


def measure(subject: Subject, tell: Callable[[str], None]) -> list[Distance]:
    """A row for every distance between the model's layers."""
    tell(subject.name)
    trace, found = subject.trace, []
    for distance in range(1, trace.num_layers):
        here = information(trace, distance)
        if distance == 1:
            adjacent = [counted - chance for counted, chance in zip(here.plug_in, here.chance, strict=True)]
        same_later_layers = fmean(adjacent[distance - 1 :])
        found.append(
            Distance(
                model=subject.name,
                distance=distance,
                pairs=len(here.plug_in),
                bits=here.net,
                error=here.error,
                share=here.share,
                to_adjacent=here.net / same_later_layers,
            )
        )
    return found


def table(rows: list[Distance]) -> str:
    return markdown(
        ["model", "distance", "pairs of layers", "bits", "of the entropy", "of what the adjacent layer says"],
        [
            [
                each.model,
                str(each.distance),
                str(each.pairs),
                f"{each.bits:.3f} ± {1.96 * each.error:.3f}",
                f"{each.share:.1%}",
                f"{each.to_adjacent:.2f}",
            ]
            for each in rows
            if each.distance in SHOWN or each.pairs == 1
        ],
    )


def figure(rows: list[Distance]) -> str:
    share, kept = [], []
    for colour, model in enumerate(dict.fromkeys(each.model for each in rows), start=1):
        points = [each for each in rows if each.model == model]
        x = [each.distance for each in points]
        share.append(Series(model, colour, x, [each.share for each in points]))
        kept.append(Series(model, colour, x, [each.to_adjacent for each in points]))
    return curves(
        "What an expert says about one some layers later",
        [
            Panel("distance in MoE layers", "bits over the later layer's entropy", share),
            Panel("distance in MoE layers", "over what the adjacent layer says", kept),
        ],
    )
