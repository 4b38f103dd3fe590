"""Placement by METIS, a graph partitioner that knows nothing of layers: parts are made equal afterwards."""

import numpy as np
import numpy.typing as npt

from exflow.placement.solve.problem import Assignment, PlacementProblem, one_hot

EDGE_WEIGHTS = 1_000_000_000  # their sum: the partitioner has 32-bit integers


def partition(problem: PlacementProblem) -> Assignment:
    """The problem's experts by METIS, in equal parts. Raises ImportError without pymetis."""
    import pymetis

    adjacency, weights = graph_of(problem)
    graph = pymetis.CSRAdjacency(*adjacency)
    _, parts = pymetis.part_graph(problem.num_parts, graph, eweights=weights)
    return repaired(problem, np.array(parts, dtype=np.int64).reshape(problem.load.shape))


def graph_of(problem: PlacementProblem) -> tuple[tuple[list[int], list[int]], list[int]]:
    """The graph for the partitioner: the places where each vertex's neighbours begin, the neighbours, and the
    edges' weights (integers).

    Vertex l * E + e is expert e of layer l. Prices too small to be a whole number make no edge.
    """
    layers, experts, _ = problem.shape
    price = np.zeros((layers, experts, layers, experts), dtype=np.float32)
    each = np.arange(layers)
    price[each, :, each, :] = problem.intra
    price[each[:-1], :, each[1:], :] = problem.inter
    price[each[1:], :, each[:-1], :] = problem.inter.transpose(0, 2, 1)
    square = price.reshape(layers * experts, layers * experts)
    weight = np.rint(square * (EDGE_WEIGHTS / square.sum(dtype=np.float64))).astype(np.int64)
    vertex, neighbour = np.nonzero(weight)
    start = np.searchsorted(vertex, np.arange(len(square) + 1))
    return (start.tolist(), neighbour.tolist()), weight[vertex, neighbour].tolist()


def repaired(problem: PlacementProblem, parts: Assignment) -> Assignment:
    """The assignment with equally many experts in each part of each layer.

    Layer by layer, of the experts in parts that have too many that one moves which loses least by going to a
    part with room.
    """
    parts = parts.copy()
    for layer in range(problem.num_layers):
        while (
            surplus := np.bincount(parts[layer], minlength=problem.num_parts) - problem.experts_per_part
        ).any():
            drawn = attachment(problem, parts, layer)
            here = np.take_along_axis(drawn, parts[layer][:, None], axis=1)
            may_go = (surplus[parts[layer]] > 0)[:, None] & (surplus < 0)
            expert, part = np.unravel_index(np.where(may_go, here - drawn, np.inf).argmin(), drawn.shape)
            parts[layer, expert] = part
    return parts


def attachment(problem: PlacementProblem, parts: Assignment, layer: int) -> npt.NDArray[np.float64]:
    """[E, G]: the prices of the pairs of each expert of a layer with the experts in each part."""
    drawn = problem.intra[layer] @ one_hot(parts[layer], problem.num_parts)
    if layer > 0:
        drawn += problem.inter[layer - 1].T @ one_hot(parts[layer - 1], problem.num_parts)
    if layer + 1 < problem.num_layers:
        drawn += problem.inter[layer] @ one_hot(parts[layer + 1], problem.num_parts)
    return np.asarray(drawn)
