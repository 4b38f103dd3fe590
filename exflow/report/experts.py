"""Load of each expert and of each GPU."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from exflow.placement.plan.topology import Topology
from exflow.report.data import Judged, Report
from exflow.report.draw.figure import Figure, Table, number
from exflow.report.draw.heatmap import Heat, Scale, heatmap, scale_bar
from exflow.report.draw.svg import drawing, short, text

_LEFT, _WIDE = 64, 880
_TALLEST = 512
_MOST_CELLS = 2_000  # that a table on the page holds
_MOST_NODES = 16  # parted by lines
_MOST_ROWS = 128  # of GPUs in a drawing

Values = npt.NDArray[np.float64]


def expert_load(report: Report) -> Figure:
    """Draw each expert's load in each layer, divided by the layer's mean."""
    about, load = report.about, report.affinity.load.astype(np.float64)
    exists = np.arange(about.num_experts) < np.array(about.experts_per_layer)[:, None]
    usual = load.sum(axis=1, keepdims=True) / np.array(about.experts_per_layer)[:, None]
    values = np.where(exists, load / usual, np.nan).T
    high = float(np.nanmax(values))
    scale = Scale(0, high, "times the mean load of the layer")
    heat = Heat(
        values,
        [str(expert) for expert in range(about.num_experts)],
        layer_names(report),
        "expert",
        "layer of the model",
        scale,
    )
    height = min(_TALLEST, 20 * about.num_experts)
    label = f"Heat map of the load of {about.num_experts} experts in {len(about.moe_layer_ids)} layers"
    body = [scale_bar(scale, _LEFT + 20, 6), heatmap(heat, _LEFT, 32, _WIDE, height)]
    return Figure(
        "expert-load",
        "Load of each expert",
        drawing(height + 76, label, body),
        _load_table(report, values),
        "Every pair of a token and an expert that it selects is one unit of load. A row is an expert, a "
        "column a layer; 1 is the layer's mean.",
    )


def gpu_load(judged: Judged, report: Report, high: float) -> Figure:
    """Draw each GPU's load in each layer over the mean. `high`, the most of all plans, ends the scale."""
    values, names = _rows(balance(judged), judged.plan.topology)
    beyond = min(max(high - 1, 0.01), 1.0)
    scale = Scale(1 - beyond, 1 + beyond, "times the mean load", "balance", open=high > 2)
    cuts = node_cuts(judged.plan.topology) if len(values) == judged.plan.num_ranks else ()
    heat = Heat(values, names, layer_names(report), "GPU", "layer of the model", scale, row_cuts=cuts)
    height = min(384, 22 * len(values))
    own = judged.plan.strategy
    body = [
        text(_LEFT, 14, f"{short(judged.name)}, {own}", kind="strong"),
        scale_bar(scale, 640, 5, 120),
        heatmap(heat, _LEFT, 26, _WIDE, height),
    ]
    per_layer = balance(judged)
    return Figure(
        f"gpu-load-{judged.slug}",
        f"Load of each GPU: {judged.name}",
        drawing(height + 70, f"Heat map of the load of each GPU in each layer under {judged.name}", body),
        Table(
            ["layer", "busiest GPU", "its load", "idlest GPU", "its load"],
            [
                (name, int(gpus.argmax()), float(gpus.max()), int(gpus.argmin()), float(gpus.min()))
                for name, gpus in zip(layer_names(report), per_layer, strict=True)
            ],
            f"Busiest and idlest GPU of each layer under {judged.name}",
        ),
    )


def balance(judged: Judged) -> Values:
    """[L, G] load over the mean under the plan's own strategy."""
    load = judged.counts[judged.own].load
    return np.asarray(load / load.mean(axis=1, keepdims=True), dtype=np.float64)


def layer_names(report: Report) -> list[str]:
    """Names of the MoE layers: their numbers among all layers of the model."""
    return [str(layer) for layer in report.about.moe_layer_ids]


def node_cuts(topology: Topology) -> Sequence[int]:
    """First GPU of each node but the first. Empty for so many nodes that lines would hide the cells."""
    if topology.num_nodes > _MOST_NODES:
        return ()
    return range(topology.gpus_per_node, topology.num_ranks, topology.gpus_per_node)


def blocks(number_of: int, most: int) -> npt.NDArray[np.int64]:
    """First index of each of at most `most` equal blocks."""
    size = -(-number_of // most)
    return np.arange(0, number_of, size)


def _rows(by_layer: Values, topology: Topology) -> tuple[Values, list[str]]:
    """Rows of the heat map, one for each GPU. Very many GPUs become equal blocks with their means."""
    begin = blocks(topology.num_ranks, _MOST_ROWS)
    sizes = np.diff([*begin, topology.num_ranks])
    means = np.add.reduceat(by_layer, begin, axis=1) / sizes
    return means.T, [str(first) for first in begin]


def _load_table(report: Report, values: Values) -> Table:
    """Table of all loads, or of each layer's extremes if there are too many."""
    names, load = layer_names(report), report.affinity.load
    if load.size <= _MOST_CELLS:
        return Table(
            ["expert", *(f"layer {name}" for name in names)],
            [
                (expert, *("" if np.isnan(value) else float(value) for value in row))
                for expert, row in enumerate(values)
            ],
            "Load of each expert in each layer, over the layer's mean",
        )
    rows = []
    for name, column in zip(names, values.T, strict=True):
        order = np.argsort(np.nan_to_num(-column, nan=np.inf), kind="stable")
        present = int((~np.isnan(column)).sum())
        busiest = ", ".join(f"{expert} ({number(float(column[expert]))})" for expert in order[:3])
        rows.append((name, busiest, float(column[order[present - 1]]), int((column == 0).sum())))
    return Table(
        ["layer", "busiest experts (times the mean)", "least load", "experts without a token"],
        rows,
        "The busiest experts of each layer; --json gives all loads",
        texts=2,
    )
