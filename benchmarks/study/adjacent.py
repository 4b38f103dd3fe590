"""Mutual information of the experts of adjacent layers, beside a shuffled control."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np

from benchmarks.study.data import Subject
from benchmarks.study.figures import Panel, Series, curves, markdown
from benchmarks.study.information import Information, information


@dataclass(frozen=True)
class Adjacent(Information):
    """The information of a model's adjacent layers, and of how many tokens it was counted."""

    model: str
    tokens: int
    sequences: int
    experts: int

    @property
    def expected_chance(self) -> float:
        """Bits of the control by theory."""
        return (self.experts - 1) ** 2 / (2 * self.tokens * math.log(2))


def measure(subject: Subject, tell: Callable[[str], None]) -> list[Adjacent]:
    """One row, of all domains together."""
    tell(subject.name)
    trace = subject.trace
    found = Adjacent(
        **asdict(information(trace)),
        model=subject.name,
        tokens=trace.num_tokens,
        sequences=len(np.unique(trace.sequence)),
        experts=trace.num_experts,
    )
    return [found]


def table(rows: list[Adjacent]) -> str:
    headings = [
        "model",
        "tokens",
        "sequences",
        "entropy",
        "as counted",
        "shuffled",
        "expected of shuffled",
        "net",
        "net of the entropy",
        "shuffled inside sequences, net",
    ]
    lines = [
        [
            each.model,
            f"{each.tokens:,}",
            str(each.sequences),
            f"{fmean(each.entropy):.3f}",
            f"{fmean(each.plug_in):.3f}",
            f"{fmean(each.chance):.4f}",
            f"{each.expected_chance:.4f}",
            f"{each.net:.3f} ± {1.96 * each.error:.3f}",
            f"{each.share:.1%}",
            f"{each.of_topic:.3f}",
        ]
        for each in rows
    ]
    return markdown(headings, lines)


def figure(rows: list[Adjacent]) -> str:
    """Layer by layer; lines without markers are the control."""
    counted = []
    for colour, each in enumerate(rows, start=1):
        x = list(range(len(each.plug_in)))
        counted.append(Series(each.model, colour, x, each.plug_in))
        counted.append(Series(f"{each.model}, shuffled", colour, x, each.chance, marked=False))
    return curves(
        "Bits that an expert says about the next layer's, layer by layer",
        [Panel("earlier MoE layer of the two", "bits", counted)],
    )
