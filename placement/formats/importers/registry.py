"""The placement formats of other engines by name, and reading a file of one of them as a plan."""

import codecs
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from exflow.errors import InputError
from exflow.placement.formats.exporters.sidecar import ModelShape, Sidecar, read_sidecar, sidecar_path
from exflow.placement.formats.importers.eplb import is_eplb, read_eplb
from exflow.placement.formats.importers.exflow_csv import is_exflow, read_exflow
from exflow.placement.formats.importers.foreign import ForeignMap, check_every_expert_placed, decoded
from exflow.placement.formats.importers.sglang import is_sglang, read_sglang
from exflow.placement.formats.importers.trtllm import is_trtllm, read_trtllm
from exflow.placement.formats.importers.vllm import is_vllm, read_vllm
from exflow.placement.formats.importers.vllm_ascend import is_vllm_ascend, read_vllm_ascend
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

MAX_BYTES = 1 << 25  # ten times a large model's map in the wordiest format


@dataclass(frozen=True)
class ImportFormat:
    """A format of an engine.

    matches  tells by a file's bytes whether it is of this format
    read     returns the placement in the bytes, for a model
    """

    matches: Callable[[bytes], bool]
    read: Callable[[bytes, ModelShape], ForeignMap]


FORMATS = {
    "eplb": ImportFormat(is_eplb, read_eplb),
    "sglang": ImportFormat(is_sglang, read_sglang),
    "vllm-ascend": ImportFormat(is_vllm_ascend, read_vllm_ascend),
    "vllm": ImportFormat(is_vllm, read_vllm),
    "exflow": ImportFormat(is_exflow, read_exflow),
    "trtllm": ImportFormat(is_trtllm, read_trtllm),
}


def read_plan(
    path: Path,
    format: str | None = None,
    *,
    trace: RoutingTrace | None = None,
    topology: Topology | None = None,
) -> Plan:
    """The plan with the map in `path`, slot for slot.

    format    a name of FORMATS; without it the content decides
    trace     of the placed model: says its layers and experts, and the plan's expected figures are counted on
              it. Without it the file's sidecar says them
    topology  where the ranks are. Without it the sidecar says it, else the file's own count of ranks, on one
              node

    Raises InputError, beginning with the file's name, where the file is damaged or of another model, or where
    nothing says the model or the ranks.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"format {format!r} is not known; give one of {', '.join(FORMATS)}")
    content = _read(path)
    sidecar = read_sidecar(path)
    try:
        name = format or _format_of(content)
        model = _model(path, trace, sidecar)
        found = FORMATS[name].read(content, model)
        check_every_expert_placed(found.slots, model)
        plan = Plan(
            model=model.name,
            num_hidden_layers=model.num_hidden_layers,
            moe_layer_ids=model.moe_layer_ids,
            num_experts=model.num_experts,
            experts_per_layer=model.experts_per_layer,
            topology=_topology(path, found, topology, sidecar),
            physical_to_logical_map=found.slots,
            next_owner=None,
            strategy=sidecar.strategy if sidecar else Strategy.DISPATCH_COMBINE,
            method=sidecar.method if sidecar else f"imported from {name}",
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return plan if trace is None else _judged(plan, trace)


def _judged(plan: Plan, trace: RoutingTrace) -> Plan:
    """The plan with preferred owners and expected figures, both counted on the trace."""
    from exflow.placement.counts.owners import next_owner_table
    from exflow.placement.traffic.evaluate import evaluate  # compiled: not needed without a trace

    plan = replace(plan, next_owner=next_owner_table(trace, plan.hosts), trace_digest=trace.digest())
    return replace(plan, expected=evaluate(plan, trace))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise InputError(
                    f"{path}: has {size} bytes, a placement {MAX_BYTES} at most; give another file"
                )
            return file.read(MAX_BYTES).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a placement of an engine"
        ) from error


def _format_of(content: bytes) -> str:
    if b'"format": "exflow-plan"' in content[:100]:
        raise InputError("is a plan already; evaluate it as it is")
    for name, candidate in FORMATS.items():
        if candidate.matches(content):
            return name
    start = reprlib.repr(decoded(content)[:40])
    raise InputError(
        f"begins with {start}, no format known here; give the format, one of {', '.join(FORMATS)}"
    )


def _model(path: Path, trace: RoutingTrace | None, sidecar: Sidecar | None) -> ModelShape:
    if trace is not None:
        return ModelShape.of(trace.layout)
    if sidecar is not None:
        return sidecar.model
    raise InputError(
        f"does not say the model's layers and experts, and there is no {sidecar_path(path).name} beside it; "
        "give a trace of the model"
    )


def _topology(path: Path, found: ForeignMap, given: Topology | None, sidecar: Sidecar | None) -> Topology:
    topology = given or (sidecar.topology if sidecar else None)
    if topology is None:
        if found.num_ranks is None:
            raise InputError(
                f"does not say the number of GPUs, and there is no {sidecar_path(path).name} beside it; give "
                "it, or the topology"
            )
        return Topology(gpus_per_node=found.num_ranks)
    if found.num_ranks is not None and topology.num_ranks != found.num_ranks:
        raise InputError(f"places experts on {found.num_ranks} GPUs, not on {topology}; give the same number")
    return topology
