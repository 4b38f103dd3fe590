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

    Raises InputError if it is missing or wrong, or if its `model_type` is not known.
    """
    return model_config(folder, *read_config(folder))


def read_config(folder: Path) -> tuple[Any, Any]:
    """The content of a checkpoint folder's `config.json`, and its `model_type`."""
    remedy = "give the folder of a checkpoint (config.json, model.safetensors, tokenizer.json)"
    value = read_json(folder / CONFIG, "model configuration", remedy)
    return value, value.get("model_type", OWN) if isinstance(value, dict) else OWN


def model_config(folder: Path, settings: Any, model_type: Any) -> ModelConfig:
    """The model that the content of `config.json` describes; raises InputError as load_model_config does."""
    path = folder / CONFIG
    if model_type == OWN:
        return validated(ModelConfig, settings, path)
    from exflow.model.families import (
        FAMILIES,  # imported here: it loads torch, which our own configurations do not need
    )

    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"{path}: model_type {model_type!r} is not supported; give a model of {known}, or one of our own "
            f"({OWN})"
        )
    published = validated(FAMILIES[model_type].config, settings, path)
    return validated(ModelConfig, published.settings(path.absolute().parent.name), path)
