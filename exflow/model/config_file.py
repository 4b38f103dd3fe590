"""Reads the `config.json` of a checkpoint folder: our own, or that of a Hugging Face family."""

from pathlib import Path
from typing import Any

from exflow.errors import InputError
from exflow.files import read_json
from exflow.model.config import ModelConfig
from exflow.validation import validated

CONFIG = "config.json"
OWN = "gpt-moe"
REMEDY = "copy the checkpoint again, or give another"


def load_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder: our own, or that of a Hugging Face model of a known family.

    Raises InputError for a file that is missing or wrong, or whose `model_type` is not known.
    """
    value, model_type = read_config(folder)
    path = folder / "config.json"
    if model_type == OWN:
        return validated(ModelConfig, value, path)
    from exflow.model.families import FAMILIES  # with torch, which our own configurations do without

    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"{path}: model_type {model_type!r} is not supported; give a model of {known}, or one of our own "
            f"({OWN})"
        )
    published = validated(FAMILIES[model_type].config, value, path)
    return validated(ModelConfig, published.settings(path.absolute().parent.name), path)


def read_config(folder: Path) -> tuple[Any, Any]:
    """What `config.json` of a checkpoint folder holds, and its `model_type`."""
    remedy = "give the folder of a checkpoint (config.json, model.safetensors, tokenizer.json)"
    value = read_json(folder / "config.json", "model configuration", remedy)
    return value, value.get("model_type", OWN) if isinstance(value, dict) else OWN
