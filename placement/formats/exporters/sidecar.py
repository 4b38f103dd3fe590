"""FILE.meta.json beside an exported placement: model and topology, which no engine's format holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from exflow.errors import InputError
from exflow.files import read_json
from exflow.placement.plan.plan import Plan, placement_keys
from exflow.placement.plan.plan_file import PlacementDocument, write_document
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


class _Document(PlacementDocument):
    format: Literal["exflow-placement"]
    version: Literal[1]


def sidecar_path(path: Path) -> Path:
    """placement.json.meta.json for placement.json: two formats of one stem have one each."""
    return path.with_name(f"{path.name}.meta.json")


def write_sidecar(path: Path, plan: Plan) -> None:
    """Write the sidecar of the exported file `path`; atomically, one line a key."""
    document = _Document(format="exflow-placement", version=1, **placement_keys(plan))
    write_document(sidecar_path(path), document)


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
