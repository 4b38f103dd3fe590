"""JSON form of a topology: the cost of a message between each two GPUs (docs/topology.md)."""

import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from exflow.errors import InputError
from exflow.files import read_json
from exflow.placement.plan.topology import Topology, topology_of
from exflow.placement.plan.topology_file import MAX_GPUS

LOWEST, HIGHEST = 1e-9, 1e9  # ratios of costs beyond these would overflow where they are added up


def load_cost_matrix(path: Path, num_nodes: int = 1) -> Topology:
    """Read a list of lists of costs, in order of rank; its GPUs are spread evenly over `num_nodes`.

    Raises InputError, one line that names the file, where it is not JSON, or not a symmetric square of
    positive numbers with 0 on its diagonal.
    """
    content = read_json(path, "cost matrix", "see docs/topology.md")
    try:
        _check_shape(content)
        cost = tuple(
            tuple(_cost(value, row, column) for column, value in enumerate(values))
            for row, values in enumerate(content)
        )
        return replace(topology_of(len(cost), num_nodes), link_cost=cost)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _check_shape(content: Any) -> None:
    if not isinstance(content, list) or not content:
        raise InputError(
            f"holds {reprlib.repr(content)}; write a list of rows, with the costs of one GPU in each"
        )
    if len(content) > MAX_GPUS:
        raise InputError(f"holds {len(content)} rows; give {MAX_GPUS} GPUs at most")
    for number, row in enumerate(content):
        if not isinstance(row, list):
            raise InputError(f"row {number} is {reprlib.repr(row)}; write a list of {len(content)} costs")
        if len(row) != len(content):
            raise InputError(
                f"row {number} holds {len(row)} costs, but there are {len(content)} rows; "
                "give every GPU the cost to each"
            )


def _cost(value: Any, row: int, column: int) -> float:
    if type(value) in (int, float) and (value == 0 or LOWEST <= value <= HIGHEST):
        return float(value)
    raise InputError(
        f"row {row}, column {column} is {reprlib.repr(value)}; "
        f"give a number from {LOWEST:g} to {HIGHEST:g}, or 0 on the diagonal"
    )
