"""TensorRT-LLM's MoeLoadBalancer YAML (see exporters/trtllm.py)."""

import re
import reprlib

from exflow.errors import InputError
from exflow.placement.formats.exporters.sidecar import ModelShape
from exflow.placement.formats.importers.flat_yaml import parsed_yaml
from exflow.placement.formats.importers.foreign import ForeignMap, decoded, fields, number, table

_KEYS = ("initial_global_assignments", "num_slots", "layer_updates_per_iter")
_DEFAULTS = {"layer_updates_per_iter": 0}  # of MoeLoadBalancerConfig


def read_trtllm(content: bytes, model: ModelShape) -> ForeignMap:
    """The rows of the MoE layers, which must be all and no others.

    `layer_updates_per_iter` must be 0, which it is where the file does not say it: otherwise the engine moves
    experts, and the map is not what it uses.
    """
    settings = parsed_yaml(decoded(content))
    if isinstance(settings, dict):
        settings = _DEFAULTS | settings
    assignments, num_slots, updates = fields("the file", settings, _KEYS)
    number(
        "layer_updates_per_iter",
        updates,
        0,
        "with which nothing moves at run time; only such maps are placements",
    )
    if not isinstance(assignments, dict):
        raise InputError(f"{_KEYS[0]}: is {reprlib.repr(assignments)}; give a list for each MoE layer")
    for layer in assignments:
        if layer not in model.moe_layer_ids:
            raise InputError(
                f"{_KEYS[0]}: holds {reprlib.repr(layer)}, which is no MoE layer of the model (they are "
                f"{reprlib.repr(list(model.moe_layer_ids))}); remove it, or give a trace of the file's model"
            )
    for layer in model.moe_layer_ids:
        if layer not in assignments:
            raise InputError(f"{_KEYS[0]}: has no entry for hidden layer {layer}; add it")
    slots = table({f"{_KEYS[0]}[{layer}]": assignments[layer] for layer in model.moe_layer_ids})
    number("num_slots", num_slots, slots.shape[1], "the length of the layers' lists; make them agree")
    return ForeignMap(slots)


def is_trtllm(content: bytes) -> bool:
    return (
        re.search(rb"(?m)^(initial_global_assignments|num_slots|layer_updates_per_iter)\s*:", content)
        is not None
    )
