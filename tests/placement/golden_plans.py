"""The golden placement files of each engine, and copies of them."""

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
FILES = {
    "sglang": "sglang.json",
    "trtllm": "trtllm.yaml",
    "vllm-ascend": "vllm-ascend.json",
    "vllm": "vllm.json",
    "eplb": "eplb.safetensors",
    "exflow": "exflow.csv",
}


def golden(format: str, folder: Path) -> Path:
    """A copy without a sidecar, under a name that says nothing of the format."""
    path = folder / "placement"
    path.write_bytes((GOLDEN / FILES[format]).read_bytes())
    return path
