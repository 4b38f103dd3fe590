"""The commands export and import-plan: convert plans to and from other engines' formats."""

from pathlib import Path
from typing import Any

from exflow.errors import InputError
from exflow.placement.formats.exporters.registry import Exported, export_plan
from exflow.placement.formats.importers.registry import read_plan
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology, topology_of
from exflow.placement.plan.topology_file import load_topology
from exflow.profiling.trace import RoutingTrace


def run_export(plan: Path, format: str, output: Path) -> Exported:
    """Write the plan for another engine. Raises InputError if the format cannot express it."""
    return export_plan(Plan.load(plan), format, output)


def run_import_plan(
    file: Path, format: str | None, trace: Path | None, topology: Topology | None, output: Path
) -> dict[str, Any]:
    """Turn another engine's placement into a plan and save it. Returns its figures, for printing."""
    routing = None if trace is None else RoutingTrace.load(trace)
    plan = read_plan(file, format, trace=routing, topology=topology)
    plan.save(output)
    return {
        "plan": str(output),
        "model": plan.model,
        "moe_layers": plan.num_layers,
        "experts": plan.num_experts,
        "slots": plan.num_slots,
        "ranks": plan.num_ranks,
        "nodes": plan.topology.num_nodes,
        "strategy": plan.strategy,
        "method": plan.method,
    }


def given_topology(gpus: int | None, nodes: int, topology: Path | None) -> Topology | None:
    """Topology from --gpus and --nodes, or from --topology; None if the placement file must have it."""
    if gpus is not None and topology is not None:
        raise InputError("--gpus and --topology both say where the GPUs are; give one")
    if topology is not None:
        return load_topology(topology)
    if gpus is not None:
        return topology_of(gpus, nodes)
    if nodes != 1:
        raise InputError(f"--nodes {nodes}: needs --gpus; give both")
    return None
