"""The placement formats of other engines by name, and writing a plan in one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exflow.errors import InputError
from exflow.files import atomic_path
from exflow.placement.formats.exporters.common import Usage
from exflow.placement.formats.exporters.eplb import eplb_usage, write_eplb
from exflow.placement.formats.exporters.exflow_csv import exflow_usage, write_exflow
from exflow.placement.formats.exporters.sglang import sglang_usage, write_sglang
from exflow.placement.formats.exporters.sidecar import sidecar_path, write_sidecar
from exflow.placement.formats.exporters.trtllm import trtllm_usage, write_trtllm
from exflow.placement.formats.exporters.vllm import vllm_usage, write_vllm
from exflow.placement.formats.exporters.vllm_ascend import vllm_ascend_usage, write_vllm_ascend
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.serving import TARGETS


@dataclass(frozen=True)
class ExportFormat:
    """A format of an engine.

    write     turns a plan into the bytes of a file
    usage     says how to give the file to the engine
    target    the engine, by its name in TARGETS
    ending    that the engine insists on in the file's name
    strategy  that the engine runs
    """

    write: Callable[[Plan], bytes]
    usage: Callable[[Plan, Path], Usage]
    target: str
    ending: str = ""
    strategy: Strategy = Strategy.DISPATCH_COMBINE


FORMATS = {
    "sglang": ExportFormat(
        write_sglang, sglang_usage, "sglang", ".json"
    ),  # another name is read as the JSON itself
    "trtllm": ExportFormat(write_trtllm, trtllm_usage, "tensorrt-llm"),
    "vllm-ascend": ExportFormat(write_vllm_ascend, vllm_ascend_usage, "vllm-ascend", ".json"),
    "vllm": ExportFormat(write_vllm, vllm_usage, "vllm"),
    "eplb": ExportFormat(write_eplb, eplb_usage, "eplb"),
    "exflow": ExportFormat(write_exflow, exflow_usage, "exflow", strategy=Strategy.COHERENT),
}


@dataclass(frozen=True)
class Exported:
    """The files that were written, and how to use the first.

    warning: what is wrong with a plan that was made for another engine, and the remedy; else None.
    """

    format: str
    path: Path
    sidecar: Path
    usage: Usage
    warning: str | None


def export_plan(plan: Plan, format: str, path: Path) -> Exported:
    """Write the plan to `path` in a format of FORMATS, and its sidecar file; each atomically.

    Raises InputError if the format is unknown or cannot express the plan, its engine would not read a file of
    that name, or the place cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r} is not known; give one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    if not path.name.endswith(chosen.ending):
        raise InputError(f"{path}: {format} reads only files that end in {chosen.ending}; name it so")
    if not str(path).isprintable():
        raise InputError(f"{path}: the name cannot be copied from a terminal; choose another")
    content = chosen.write(plan)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    write_sidecar(path, plan)
    return Exported(format, path, sidecar_path(path), chosen.usage(plan, path), _warning(plan, format))


def _warning(plan: Plan, format: str) -> str | None:
    runs, target = FORMATS[format].strategy, FORMATS[format].target
    remedy = f"make one with exflow place --for {target}"
    if plan.strategy != runs:
        made_for = f"the plan was made for strategy {plan.strategy}"
        return f"{made_for}, but the engine of {format} runs {runs}; {remedy}"
    made_for = plan.expected.get("made_for", {}).get("target", target)
    has_replicas = plan.num_slots > plan.num_experts
    if has_replicas and made_for in TARGETS and TARGETS[made_for].rule != TARGETS[target].rule:
        return (
            f"the plan was made for {made_for}, which chooses among replicas in another way than {target}: "
            f"its time is not the one stated; {remedy}"
        )
    return None
