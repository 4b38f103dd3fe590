"""The affinity of adjacent layers: a heat map for each pair of layers, experts by id or by a plan's GPUs.

Shown is what is beyond chance: otherwise popular experts would be all there is to see.

The page holds one drawing and the images of all pairs and orders, which its script puts into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.placement.counts.information import mutual_information
from exflow.report.data import Report
from exflow.report.draw import png
from exflow.report.draw.figure import Figure, Table
from exflow.report.draw.heatmap import Heat, Scale, heatmap, scale_bar
from exflow.report.draw.svg import WIDTH, drawing, text
from exflow.report.experts import blocks, layer_names
from exflow.report.followers import beyond_chance, followers

SIDE = 512.0
LEFT, TOP = 224.0, 46.0
_MOST_CELLS = 64  # a side of an image
_HIGHEST = 0.995  # the quantile of shares that the scale ends at: a few pairs would leave the others pale
_TABLED = 5  # pairs of experts for each pair of layers

Values = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """Order in which each layer's experts are drawn. `gpu` [L, E] is set if the order is a plan's."""

    name: str
    slug: str
    experts: Integers  # [L, E]
    gpu: Integers | None = None


@dataclass(frozen=True, eq=False)
class Affinity:
    """One figure for each order of experts. It shows the pair of layers where affinity is strongest.

    orders, pairs  names to choose from; first: the pair that is drawn
    cell           experts a side of a cell
    images         for the script: pixels, labels and cuts of all orders and pairs
    """

    figures: tuple[Figure, ...]
    orders: list[str]
    pairs: list[str]
    first: int
    cell: int
    images: dict[str, Any]


def affinity_figures(report: Report) -> Affinity | None:
    """Return None for a model with one MoE layer."""
    if len(report.about.moe_layer_ids) < 2:
        return None
    beyond = beyond_chance(report.affinity)
    orders = _orders(report)
    begin = blocks(report.about.num_experts, _MOST_CELLS)
    arranged = [[_arranged(each, order, i, begin) for i, each in enumerate(beyond)] for order in orders]
    high = float(np.quantile(np.abs(arranged[0]), _HIGHEST)) or 1.0
    scale = Scale(-high, high, "of the row's tokens, beyond chance", "chance", open=True)
    names = layer_names(report)
    pairs = [f"{earlier} and {later}" for earlier, later in pairwise(names)]
    first = int(np.argmax(mutual_information(report.affinity.inter)))
    listed = _follower_table(report)
    images = {
        "pixels": [
            [png.data_uri(png.levels_of(each, -high, high)) for each in values] for values in arranged
        ],
        "labels": [[_labels(order, layer, begin) for layer in _told(order)] for order in orders],
        "cuts": [
            [
                " ".join(f"{cut / len(begin):.4g}" for cut in _cuts(order, layer, begin))
                for layer in _told(order)
            ]
            for order in orders
        ],
    }
    return Affinity(
        figures=tuple(
            Figure(
                order.slug,
                "Which expert follows which",
                _drawing(
                    _heat(order, values[first], first, begin, scale), f"layers {pairs[first]}, {order.name}"
                ),
                listed,
            )
            for order, values in zip(orders, arranged, strict=True)
        ),
        orders=[order.name for order in orders],
        pairs=pairs,
        first=first,
        cell=int(np.diff([*begin, report.about.num_experts])[0]),
        images=images,
    )


def _heat(order: Order, values: Values, pair: int, begin: Integers, scale: Scale) -> Heat:
    return Heat(
        values,
        _labels(order, pair, begin),
        _labels(order, pair + 1, begin),
        "expert of the earlier layer",
        "expert of the later layer",
        scale,
        _cuts(order, pair, begin),
        _cuts(order, pair + 1, begin),
        numbers=False,  # they would stay when the script changes the image
        row_room=88,
    )


def _drawing(heat: Heat, which: str) -> str:
    return drawing(
        TOP + SIDE + 44,
        "Heat map: rows are experts of a layer, columns experts of the next",
        [
            scale_bar(heat.scale, LEFT, 8),
            text(WIDTH - 8, 17, which, anchor="end", kind="which"),
            heatmap(heat, LEFT, TOP, SIDE, SIDE),
            f'<path class="cut" data-x="{LEFT:g}" data-y="{TOP:g}" data-side="{SIDE:g}" d=""/>',
        ],
    )


def _orders(report: Report) -> list[Order]:
    shape = (len(report.about.moe_layer_ids), report.about.num_experts)
    by_id = Order("by id", "affinity", np.tile(np.arange(shape[1]), (shape[0], 1)))
    by_plan = []
    for judged in report.plans:
        gpu = judged.plan.rank_of_expert
        last = np.where(gpu < 0, judged.plan.num_ranks, gpu)  # experts that a layer lacks
        experts = np.argsort(last, axis=1, kind="stable")
        if not judged.baseline:
            by_plan.append(Order(f"by the GPUs of {judged.name}", f"affinity-{judged.slug}", experts, gpu))
    return [by_id, *by_plan]


def _arranged(beyond: Values, order: Order, layer: int, begin: Integers) -> Values:
    """Sort rows and columns by `order`. Of many experts take equal blocks: mean of rows, sum of columns."""
    arranged = beyond[np.ix_(order.experts[layer], order.experts[layer + 1])]
    sizes = np.diff([*begin, len(arranged)])
    summed = np.add.reduceat(np.add.reduceat(arranged, begin, axis=0), begin, axis=1)
    return np.asarray(summed / sizes[:, None])


def _told(order: Order) -> Sequence[int]:
    """Layers whose labels differ. Ordered by id, all layers have the same labels."""
    return [0] if order.gpu is None else range(len(order.experts))


def _labels(order: Order, layer: int, begin: Integers) -> list[str]:
    experts = order.experts[layer]
    names = []
    for start, end in zip(begin, [*begin[1:], len(experts)], strict=True):
        single = end - start == 1
        if order.gpu is None:
            names.append(str(start) if single else f"{start}-{end - 1}")
        else:
            gpu = f"GPU {order.gpu[layer, experts[start]]}"
            names.append(f"{experts[start]} ({gpu})" if single else gpu)
    return names


def _cuts(order: Order, layer: int, begin: Integers) -> list[float]:
    """Ends of the layer's GPUs, in cells."""
    if order.gpu is None:
        return []
    ends = np.flatnonzero(np.diff(order.gpu[layer, order.experts[layer]])) + 1
    experts_a_cell = begin[1] if len(begin) > 1 else len(order.experts[layer])
    return [float(end / experts_a_cell) for end in ends]


def _follower_table(report: Report) -> Table:
    names = layer_names(report)
    kept = [0] * len(names)
    rows = []
    for each in followers(report.affinity, most=1):
        if kept[each.layer] < _TABLED:
            kept[each.layer] += 1
            layers = f"{names[each.layer]} and {names[each.layer + 1]}"
            rows.append((layers, each.expert, each.follower, each.share, each.times_chance))
    return Table(
        ["layers", "expert", "followed by", "share of its tokens", "times chance"],
        rows,
        f"The {_TABLED} pairs of experts of each pair of layers that go together beyond chance most",
    )
