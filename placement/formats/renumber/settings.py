"""Settings of a checkpoint that depend on the numbers of experts: config.json, and files of quantisation."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exflow.errors import InputError
from exflow.files import read_json
from exflow.placement.formats.renumber.permute import Orders
from exflow.placement.formats.renumber.tensors import Kind, renamed, role_of

CONFIG = "config.json"
# Files that may name modules of single experts, as those that are not quantised.
FILES_OF_NAMES = (CONFIG, "hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.json")
REMEDY = "give the folder of a Hugging Face checkpoint"
_GROUPS = ("n_group", "num_expert_group")
_NAMES_AN_EXPERT = re.compile(r"experts\W{1,3}\d")


def read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG, "model configuration", REMEDY)
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: holds no settings; {REMEDY}")
    return config


def routing_groups(config: dict[str, Any]) -> int:
    """The number of routing groups, from settings at any depth; 1 if none are named."""
    counts = [value for key, value in _settings(config) if key in _GROUPS and type(value) is int]
    return max(counts, default=1)


def check_num_layers(source: Path, config: dict[str, Any], wanted: int) -> None:
    """Raise InputError if config.json names numbers of hidden layers, none of which is the plan's."""
    counts = {value for key, value in _settings(config) if key in ("num_hidden_layers", "n_layer")}
    if counts and wanted not in counts:
        raise InputError(
            f"{source}: num_hidden_layers is {', '.join(map(str, counts))}, in the plan {wanted}; use a plan "
            "that was placed on a trace of this model"
        )


def with_new_names(source: Path, value: Any, num_hidden_layers: int, orders: Orders) -> Any:
    """The content of a file in which the names of experts' modules are the new ones.

    Raises InputError for a pattern that names single experts.
    """
    if isinstance(value, dict):
        return {
            with_new_names(source, key, num_hidden_layers, orders): with_new_names(
                source, inner, num_hidden_layers, orders
            )
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [with_new_names(source, inner, num_hidden_layers, orders) for inner in value]
    if not isinstance(value, str) or not _NAMES_AN_EXPERT.search(value):
        return value
    return _new_name(source, value, num_hidden_layers, orders)


def _new_name(source: Path, name: str, num_hidden_layers: int, orders: Orders) -> str:
    role = role_of(f"{name}.weight", num_hidden_layers) if re.fullmatch(r"[\w.]+", name) else None
    if role is None or (role.kind == Kind.OTHER):
        raise InputError(
            f"{source}: '{name}' is a pattern that names single experts, which cannot be renumbered; write "
            "the full names of the modules"
        )
    order = orders.get(role.layer, ()) if role.layer is not None else ()
    if role.kind != Kind.OWN or role.expert not in order:
        return name
    return renamed(f"{name}.weight", role, order.index(role.expert)).removesuffix(".weight")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """The keys and values at any depth: models of several modalities nest those of the language model."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _settings(inner)
