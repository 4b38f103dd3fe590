"""FILE.meta.json beside an exported placement: model and topology, which no engine's format holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from exflow.errors import InputError
from exflow.files import atomic_path, read_json
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.plan_file import Count, Index, OwnedStrategy, TopologyDocument
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.profiling.layout import RoutingLayout
from exflow.validation import validated

_REMEDY = "export the plan again, or remove the file and import with a trace of the model"


@dataclass(frozen=True)
class ModelShape:
    """The routed part of a model, as a placement sees it. Raises InputError where the numbers disagree."""

    name: str
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    experts_per_layer: tuple[int, ...]

    def __post_init__(self) -> None:
        any_top_k = 1  # which has no part in a placement; the checks are a trace's
        RoutingLayout(
            self.name,
            self.num_hidden_layers,
            self.moe_layer_ids,
            self.num_experts,
            any_top_k,
            self.experts_per_layer,
        )

    @classmethod
    def of(cls, layout: RoutingLayout) -> Self:
        return cls(
            layout.model,
            layout.num_hidden_layers,
            layout.moe_layer_ids,
            layout.num_experts,
            layout.expert_counts,
        )

    @property
    def num_layers(self) -> int:
        """The number of MoE layers."""
        return len(self.moe_layer_ids)


@dataclass(frozen=True)
class Sidecar:
    """The parts of a plan that its map does not hold; together with the map they are enough for an import."""

    model: ModelShape
    topology: Topology
    strategy: Strategy
    method: str


class _Document(BaseModel):
    """The keys of the file, in the order in which they are written; all are required."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["exflow-placement"]
    version: Literal[1]
    model: str
    num_hidden_layers: Count
    moe_layer_ids: list[Index]
    num_experts: Count
    experts_per_layer: list[Count]
    topology: TopologyDocument
    strategy: OwnedStrategy
    method: str


def sidecar_path(path: Path) -> Path:
    """placement.json.meta.json for placement.json: two formats of one stem have one each."""
    return path.with_name(f"{path.name}.meta.json")


def write_sidecar(path: Path, plan: Plan) -> None:
    """Write the sidecar of the exported file `path`; atomically, one line a key."""
    document = _Document(
        format="exflow-placement",
        version=1,
        model=plan.model,
        num_hidden_layers=plan.num_hidden_layers,
        moe_layer_ids=[int(layer) for layer in plan.moe_layer_ids],
        num_experts=plan.num_experts,
        experts_per_layer=[int(count) for count in plan.experts_per_layer],
        topology=TopologyDocument.of(plan.topology),
        strategy=plan.strategy,
        method=plan.method,
    )
    lines = ",\n".join(f' "{key}": {json.dumps(value)}' for key, value in document.model_dump().items())
    with atomic_path(sidecar_path(path)) as temporary:
        temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of the exported file `path`, or None if it has none; InputError if it is damaged."""
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        return None
    document = validated(_Document, read_json(sidecar, "sidecar file", _REMEDY), sidecar, _REMEDY)
    try:
        topology = document.topology.topology()
        model = ModelShape(
            document.model,
            document.num_hidden_layers,
            tuple(document.moe_layer_ids),
            document.num_experts,
            tuple(document.experts_per_layer),
        )
    except InputError as error:
        raise InputError(f"{sidecar}: {error}") from error
    return Sidecar(model, topology, document.strategy, document.method)
