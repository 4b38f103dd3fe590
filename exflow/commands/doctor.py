"""The doctor command: lists the parts of ExFlow that this machine can run, and missing packages."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# package: (its use, how to get it)
OPTIONAL = {
    "transformers": ("exflow profile hf:FOLDER, exflow.record", "pip install 'exflow[transformers]'"),
    "triton": ("captured decode steps on GPUs", "pip install triton, as torch's CUDA builds do"),
    "megablocks": ("an experimental back end of the experts", "pip install 'exflow[megablocks]'"),
}
REQUIRED = (
    *("torch", "numpy", "scipy", "numba", "pulp", "highspy", "threadpoolctl", "networkx", "pyyaml"),
    *("pydantic", "safetensors", "tokenizers", "typer", "rich", "jinja2"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the result. found: version or description, empty if missing."""

    name: str
    found: str
    needed_for: str = ""
    remedy: str = ""
    required: bool = False

    @property
    def missing(self) -> bool:
        return not self.found


def examine() -> list[Finding]:
    """Look for everything that ExFlow may use on this machine."""
    packages = [Finding(name, _version(name), "everything", f"pip install {name}", True) for name in REQUIRED]
    extras = [Finding(name, _version(name), use, remedy) for name, (use, remedy) in OPTIONAL.items()]
    numba, torch = (_version(name) for name in ("numba", "torch"))
    return [*_machine(), *packages, *extras, *([_cache()] if numba else []), *(_torch() if torch else [])]


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The findings for JSON, by name: found and missing ones."""
    return {
        "found": {each.name: each.found for each in findings if not each.missing},
        "missing": {
            each.name: {"needed_for": each.needed_for, "remedy": each.remedy}
            for each in findings
            if each.missing
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _machine() -> list[Finding]:
    return [
        Finding("exflow", _version("exflow") or "not installed as a package"),
        Finding("python", platform.python_version()),
        Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Finding("cores", str(os.cpu_count())),
    ]


def _cache() -> Finding:
    """Find the folder of compiled code; without it place and report first compile for some seconds."""
    from exflow.placement.compiled import cache_folder

    remedy = "NUMBA_CACHE_DIR=FOLDER, one that can be written to"
    return Finding("compiled code", str(cache_folder() or ""), "a quick start of place and report", remedy)


def _torch() -> list[Finding]:
    """Look for devices, and for transports between ranks."""
    import torch
    import torch.distributed as dist

    gpus = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())]
    shown = f"{len(gpus)} x {gpus[0]}, CUDA {torch.version.cuda}" if gpus else ""
    one_sided = ""
    if len(gpus) > 1 and _version("triton"):
        pairs = [(a, b) for a in range(len(gpus)) for b in range(len(gpus)) if a != b]
        reach = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        one_sided = "all GPUs reach each other's memory" if reach else ""
    captured = "one CUDA graph a step" if gpus and _version("triton") else ""
    return [
        Finding("GPUs", shown, "captured decode steps", "install torch's CUDA build on a machine with GPUs"),
        Finding("gloo", "yes" if dist.is_gloo_available() else "", "ranks on CPUs", "another build of torch"),
        Finding("nccl", "yes" if dist.is_nccl_available() else "", "ranks on GPUs", "torch's CUDA build"),
        Finding("captured steps", captured, "transports collective and one-sided", "GPUs and triton"),
        Finding("one-sided writes", one_sided, "transport one-sided", "GPUs joined by NVLink, and triton"),
    ]
