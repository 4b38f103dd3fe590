"""The tensors of DeepSeek's EPLB in a safetensors file (see exporters/eplb.py)."""

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from exflow.errors import InputError
from exflow.placement.eplb import logical_maps
from exflow.placement.exporters.sidecar import ModelShape
from exflow.placement.importers.foreign import ForeignMap, check_every_expert_placed, fields

_NAMES = ("physical_to_logical_map", "logical_to_physical_map", "expert_count")
_REMEDY = "save what rebalance_experts returned"


def read_eplb(content: bytes, model: ModelShape) -> ForeignMap:
    """The map [L, P]; the two other tensors must be those that follow from it."""
    try:
        tensors = load(content)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that numpy does not have
        reason = " ".join(str(error).split())
        raise InputError(f"is no safetensors file of integers ({reason}); {_REMEDY}") from error
    slots, physical, count = fields("the file", tensors, _NAMES)
    for name in _NAMES:
        if tensors[name].dtype != np.int64:
            raise InputError(f"{name}: is {tensors[name].dtype}; give int64")
    if slots.ndim != 2 or len(slots) != model.num_layers or not slots.size or slots.min() < 0:
        raise InputError(
            f"{_NAMES[0]}: has the shape {slots.shape}, or negative ids; give a row of ids from 0 up for "
            f"each of {model.num_layers} MoE layers"
        )
    check_every_expert_placed(slots, model)
    for name, found, expected in zip(
        _NAMES[1:], (physical, count), logical_maps(slots, model.num_experts), strict=True
    ):
        if not np.array_equal(found, expected):
            raise InputError(f"{name}: does not say the same as {_NAMES[0]}; {_REMEDY}")
    return ForeignMap(slots)


def is_eplb(content: bytes) -> bool:
    """Whether the header of a safetensors file names the map."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    return len(header) == length and header.startswith(b"{") and b'"physical_to_logical_map"' in header
