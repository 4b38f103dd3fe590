"""Sizes of a model that decide the time of a step: bytes of an exchanged row, and of an expert.

They are read from a `config.json`, without the model's code: shapes that the runtime cannot run serve too.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from exflow.errors import InputError
from exflow.files import read_json

_BYTES = 2  # of a number: bfloat16
_HIDDEN, _INNER = 4096, 1536  # of a model whose sizes are not known
_INNER_KEYS = ("moe_intermediate_size", "intermediate_size")
_REMEDY = "give the folder of a model's config.json, or the name of a folder in configs/shapes"


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model `name`, in numbers: hidden state, expert, keys and values of a token in a layer."""

    name: str
    hidden_size: int
    expert_weights: int
    kv_width: int

    @property
    def row_bytes(self) -> int:
        """Size of a hidden state."""
        return self.hidden_size * _BYTES

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's weights."""
        return self.expert_weights * _BYTES

    @property
    def kv_bytes(self) -> int:
        """Size of a token's keys and values in a layer."""
        return self.kv_width * _BYTES

    @property
    def operations(self) -> int:
        """Operations of one expert on one row."""
        return 2 * self.expert_weights


UNKNOWN = ModelSizes(
    f"an unknown model (hidden {_HIDDEN}, expert {_INNER})", _HIDDEN, 3 * _HIDDEN * _INNER, _HIDDEN // 4
)


def sizes_of(model: str) -> ModelSizes:
    """The sizes of a model: by the name of a folder in configs/shapes, or from a folder with config.json.

    Raises InputError for an unknown name, or a file without these sizes.
    """
    shapes = _shapes()
    folder = shapes.get(model.lower(), Path(model))
    if not (folder / "config.json").is_file():
        raise InputError(f"model {model!r} is unknown; give one of {', '.join(shapes)}, or a model's folder")
    return _read(folder, model if model.lower() in shapes else str(folder))


def sizes_for_trace(model: str) -> ModelSizes:
    """The sizes of the model that a trace names, where a folder in configs/shapes has this name; else
    UNKNOWN."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    shapes = _shapes()
    return _read(shapes[name], name) if name in shapes else UNKNOWN


def _shapes() -> dict[str, Path]:
    folder = Path(str(files("exflow"))) / "configs" / "shapes"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


def _read(folder: Path, name: str) -> ModelSizes:
    path = folder / "config.json"
    config = read_json(path, "model configuration", _REMEDY)
    config = config.get("text_config", config) if isinstance(config, dict) else {}
    hidden = _number(path, config, ("hidden_size",))
    inner = _number(path, config, _INNER_KEYS)
    matrices = 2 if config.get("activation") == "gelu" else 3
    return ModelSizes(name, hidden, matrices * hidden * inner, _kv_width(config, hidden))


def _kv_width(config: dict[str, Any], hidden: int) -> int:
    """Numbers of a token's keys and values in a layer; of its latent, where the model keeps that instead."""
    if "kv_lora_rank" in config:
        return int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim", 0))
    heads = config.get("num_attention_heads") or 1
    kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    return 2 * int(kv_heads) * int(config.get("head_dim") or hidden // heads)


def _number(path: Path, config: dict[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and 0 < value < 1 << 24:
            return value
    raise InputError(f"{path}: has no {' or '.join(keys)}; {_REMEDY}")
