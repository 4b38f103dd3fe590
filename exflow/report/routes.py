"""Routes of tokens through GPUs: ribbons between layers. Their width is the number of tokens.

Shapes: B blocks of ranks (see counts.py).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from exflow.report.counts import blocks_of
from exflow.report.data import Judged, Report
from exflow.report.draw.figure import Figure, Table
from exflow.report.draw.svg import WIDTH, drawing, key, rect, short, text
from exflow.report.experts import layer_names

WINDOW = 8  # layers in a drawing
_LEFT, _TOP, _HIGH, _BAR, _SPACE = 60.0, 56.0, 300.0, 10.0, 4.0
_THINNEST = 0.15  # ribbons are left out below
_LABEL = 10.0  # the least height of a bar that is labelled

Shares = npt.NDArray[np.float64]


def windows(report: Report) -> list[range]:
    """Split MoE layers into windows of a few layers. Each begins with the last layer of the one before."""
    layers = len(report.about.moe_layer_ids)
    return [range(start, min(start + WINDOW, layers)) for start in range(0, max(layers - 1, 1), WINDOW - 1)]


def routes(judged: Judged, report: Report, window: range) -> Figure:
    """Draw the owners of tokens before and after each layer of the window, under coherence."""
    moved = judged.counts["coherent"].moves / report.about.tokens
    names, block = layer_names(report), blocks_of(judged.plan.topology)
    gpus = block_names(block)
    node = judged.plan.topology.node_of_rank[[int(np.flatnonzero(block == b)[0]) for b in range(len(gpus))]]
    step = (WIDTH - 2 * _LEFT - _BAR) / len(window)
    body = [
        text(_LEFT, 14, short(judged.name), kind="strong"),
        key(_LEFT + 330, 14, _legend(judged)),
        *(_column(moved[layer].sum(axis=1), _LEFT + i * step, gpus) for i, layer in enumerate(window)),
        _column(moved[window[-1]].sum(axis=0), _LEFT + len(window) * step, gpus),
        *(
            text(_LEFT + i * step, _TOP - 12, f"before {names[layer]}", kind="small")
            for i, layer in enumerate(window)
        ),
        text(
            _LEFT + len(window) * step, _TOP - 12, f"after {names[window[-1]]}", kind="small", anchor="middle"
        ),
        *_gpu_labels(moved[window[0]].sum(axis=1), gpus),
        *_flow(moved, window, step, gpus, node),
    ]
    what = f"layers {names[window[0]]} to {names[window[-1]]}"
    return Figure(
        f"routes-{judged.slug}-{names[window[0]]}",
        f"Routes through {what}: {judged.name}",
        drawing(_TOP + _HIGH + 12, f"Ribbons of tokens between GPUs, {what}, under {judged.name}", body),
        _route_table(moved, node, judged, window, names),
    )


def _legend(judged: Judged) -> list[tuple[str, str]]:
    """Legend entries for the kinds of ribbons that can occur."""
    ranks, nodes = judged.plan.num_ranks, judged.plan.topology.num_nodes
    whole = blocks_of(judged.plan.topology).max() + 1 == ranks
    entries = [("stay", "stays on its GPU" if whole else "stays in its block of GPUs")]
    if judged.plan.topology.gpus_per_node > 1:
        entries.append(("intra", "moves inside the node"))
    return [*entries, ("inter", "moves between nodes")] if nodes > 1 else entries


def block_names(block: npt.NDArray[np.int64]) -> list[str]:
    """Name blocks of ranks: GPU 3, or 4-7 for several GPUs."""
    ends = [(np.flatnonzero(block == b)[0], np.flatnonzero(block == b)[-1]) for b in range(block.max() + 1)]
    return [f"GPU {first}" if first == last else f"{first}-{last}" for first, last in ends]


def _scale(count: int) -> float:
    return _HIGH - _SPACE * (count - 1)


def _tops(sizes: Shares) -> Shares:
    """[B] y at which each GPU's bar begins."""
    before = np.concatenate([[0.0], np.cumsum(sizes)[:-1]])
    return np.asarray(_TOP + before * _scale(len(sizes)) + _SPACE * np.arange(len(sizes)))


def _column(sizes: Shares, x: float, gpus: Sequence[str]) -> str:
    return "".join(
        rect(x, top, _BAR, size * _scale(len(sizes)), "gpu", f"{name}: {size:.1%} of the tokens")
        for top, size, name in zip(_tops(sizes), sizes, gpus, strict=True)
    )


def _gpu_labels(sizes: Shares, gpus: Sequence[str]) -> Iterator[str]:
    for top, size, name in zip(_tops(sizes), sizes, gpus, strict=True):
        if (high := size * _scale(len(sizes))) >= _LABEL:
            yield text(_LEFT - 6, top + high / 2 + 4, name, anchor="end", kind="small")


def _flow(
    moved: Shares, window: range, step: float, gpus: Sequence[str], node: npt.NDArray[np.int64]
) -> Iterator[str]:
    """Draw all ribbons. Tokens that stay come last, so they lie on top."""
    yield '<g class="flow">'
    for kind in ("inter", "intra", "stay"):
        yield f'<g class="{kind}">'
        for i, layer in enumerate(window):
            yield from _ribbons(
                moved[layer], _LEFT + i * step + _BAR, step - _BAR, gpus, _kinds(node) == kind
            )
        yield "</g>"
    yield "</g>"


def _kinds(node: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """[B, B] kind of the way from one block to another."""
    near = np.where(node[:, None] == node, "intra", "inter")
    return np.where(np.eye(len(node), dtype=bool), "stay", near)


def _ribbons(
    moved: Shares, x: float, wide: float, gpus: Sequence[str], drawn: npt.NDArray[np.bool_]
) -> Iterator[str]:
    """Draw ribbons as lines, sorted by GPU at both ends so that they cross little."""
    scale = _scale(len(moved))
    starts = _tops(moved.sum(axis=1))[:, None] + scale * (np.cumsum(moved, axis=1) - moved / 2)
    ends = _tops(moved.sum(axis=0))[None, :] + scale * (np.cumsum(moved, axis=0) - moved / 2)
    for one, other in np.argwhere(drawn & (scale * moved >= _THINNEST)):
        y, fall = starts[one, other], ends[one, other] - starts[one, other]
        yield (
            f'<path d="M{x:.0f} {y:.1f}c{wide / 2:.0f} 0 {wide / 2:.0f} {fall:.1f} {wide:.0f} {fall:.1f}" '
            f'stroke-width="{scale * moved[one, other]:.2g}">'
            f"<title>{gpus[one]} to {gpus[other]}: {moved[one, other]:.1%}</title></path>"
        )


def _route_table(
    moved: Shares, node: npt.NDArray[np.int64], judged: Judged, window: range, names: Sequence[str]
) -> Table:
    near = node[:, None] == node
    rows = []
    for layer in window:
        stay, inside = float(np.trace(moved[layer])), float(moved[layer][near].sum())
        rows.append((names[layer], stay, inside - stay, 1 - inside))
    return Table(
        ["layer", "stay", "move inside a node", "move between nodes"],
        rows,
        f"Shares of tokens that stay and move in each layer under {judged.name}",
    )
