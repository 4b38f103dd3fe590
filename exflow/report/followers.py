"""Transitions that stand out: the experts that a token most likely meets next."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exflow.placement.counts.affinity import AffinityCounts


@dataclass(frozen=True)
class Follower:
    """Share of the tokens of `expert` in MoE layer `layer` that select `follower` in the next MoE layer."""

    layer: int
    expert: int
    follower: int
    share: float
    times_chance: float  # the share divided by the share of all tokens


def shares(affinity: AffinityCounts) -> npt.NDArray[np.float64]:
    """[L-1, E, E] share of the tokens that select e in a layer which select f in the next."""
    return np.asarray(affinity.inter / np.maximum(affinity.load[:-1, :, None], 1))


def beyond_chance(affinity: AffinityCounts) -> npt.NDArray[np.float64]:
    """[L-1, E, E] `shares`, less the share of all tokens that selects f; zero where none selects e."""
    usual = affinity.load[1:, None, :] / affinity.num_tokens
    return np.asarray(np.where(affinity.load[:-1, :, None] > 0, shares(affinity) - usual, 0.0))


def followers(affinity: AffinityCounts, most: int) -> list[Follower]:
    """List each layer's pairs of experts, the `most` strongest followers of each expert.

    Pairs are sorted by the number of tokens beyond chance.
    """
    found = []
    for layer, (share, more) in enumerate(zip(shares(affinity), beyond_chance(affinity), strict=True)):
        usual = affinity.load[layer + 1] / affinity.num_tokens
        beyond = affinity.load[layer][:, None] * more
        kept = np.argsort(-beyond, axis=1, kind="stable")[:, :most]
        pairs = [(e, int(f)) for e, best in enumerate(kept) for f in best if affinity.load[layer, e]]
        pairs.sort(key=lambda pair: -beyond[pair])
        found += [
            Follower(layer, e, f, float(share[e, f]), float(share[e, f] / usual[f]) if usual[f] else 0.0)
            for e, f in pairs
        ]
    return found
