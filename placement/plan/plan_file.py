"""The JSON form of a plan: its keys, its layout, and the errors for a damaged file.

The format is specified in docs/plan-format.md.
"""

import json
import reprlib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat
from pydantic_core import PydanticCustomError

from exflow.errors import InputError
from exflow.files import atomic_path, read_json
from exflow.placement.plan.strategy import OWNED, Strategy
from exflow.placement.plan.topology import Topology
from exflow.validation import validated

VERSION: Final = 3
_NEW_KEYS = {2: {"serving_rank": None}, VERSION: {}}  # what a file of a version lacks
_REMEDY = "make the plan again with exflow place"
_TABLES = ("physical_to_logical_map", "next_owner", "serving_rank")  # written with one line a layer

Count = Annotated[int, Field(ge=1, lt=1 << 63)]
Index = Annotated[int, Field(ge=0, lt=1 << 16)]
PerMille = Annotated[int, Field(ge=0, le=1000)]


def _owned(name: Any) -> Strategy:
    if name not in OWNED:
        raise PydanticCustomError(
            "strategy", "Input should be 'coherent', 'node-coherent' or 'dispatch-combine'"
        )
    return Strategy(name)


OwnedStrategy = Annotated[Strategy, BeforeValidator(_owned)]
"""A strategy that a plan can be made for."""


class TopologyDocument(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    num_nodes: Count
    gpus_per_node: Count
    link_cost: list[list[FiniteFloat]] | None

    @classmethod
    def of(cls, topology: Topology) -> Self:
        cost = topology.link_cost
        return cls(
            num_nodes=topology.num_nodes,
            gpus_per_node=topology.gpus_per_node,
            link_cost=None if cost is None else [list(row) for row in cost],
        )

    def topology(self) -> Topology:
        """The topology; raises InputError where the numbers contradict each other."""
        cost = None if self.link_cost is None else tuple(map(tuple, self.link_cost))
        return Topology(num_nodes=self.num_nodes, gpus_per_node=self.gpus_per_node, link_cost=cost)


class PlacementDocument(BaseModel):
    """The first keys of a plan file and of a sidecar, in the order of writing; all are required."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: str
    version: int
    model: str
    num_hidden_layers: Count
    moe_layer_ids: list[Index]
    num_experts: Count
    experts_per_layer: list[Count]
    topology: TopologyDocument
    strategy: OwnedStrategy
    method: str


class PlanDocument(PlacementDocument):
    """The keys of a plan file, in the order in which they are written; all are required."""

    format: Literal["exflow-plan"]
    version: Literal[3]
    objective: FiniteFloat | None
    lower_bound: FiniteFloat | None
    optimal: bool
    expected: dict[str, Any]
    trace_digest: str
    physical_to_logical_map: list[list[Index]]
    next_owner: list[list[list[PerMille]]] | None
    serving_rank: list[list[list[Index]]] | None


def read_document(path: Path) -> PlanDocument:
    """Read a plan file whose keys and types are right; InputError names the first key that is not."""
    content = read_json(path, "plan", _REMEDY)
    if not isinstance(content, dict) or content.get("format") != "exflow-plan":
        raise InputError(f'{path}: is not a plan (no "format": "exflow-plan"); {_REMEDY}')
    version = content.get("version")
    if type(version) is not int or version not in _NEW_KEYS:
        known = " and ".join(map(str, _NEW_KEYS))
        raise InputError(
            f"{path}: version is {reprlib.repr(version)}, this exflow reads versions {known}; {_REMEDY}"
        )
    content = _NEW_KEYS[version] | content | {"version": VERSION}
    return validated(PlanDocument, content, path, _REMEDY)


def table(key: str, rows: list[Any], shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The nested lists of `key` as an array; InputError names the row whose length is not that of `shape`."""
    _check_lengths(key, rows, shape)
    return np.array(rows, dtype=np.int64)


def write_document(path: Path, document: PlacementDocument) -> None:
    """Write one line a key, and of the tables one line a layer; atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(_layout(document.model_dump()), encoding="utf-8")


def _layout(content: dict[str, Any]) -> str:
    lines = []
    for key, value in content.items():
        text = json.dumps(value, allow_nan=False)
        if key in _TABLES and value is not None:
            text = "[\n  " + ",\n  ".join(json.dumps(layer) for layer in value) + "\n ]"
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _check_lengths(key: str, rows: list[Any], shape: tuple[int, ...]) -> None:
    if len(rows) != shape[0]:
        raise InputError(f"{key}: has {len(rows)} entries instead of {shape[0]}; {_REMEDY}")
    if len(shape) > 1:
        for index, row in enumerate(rows):
            _check_lengths(f"{key}[{index}]", row, shape[1:])
