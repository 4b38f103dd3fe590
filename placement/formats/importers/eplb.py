"""The tensors of DeepSeek's EPLB in a safetensors file (see exporters/eplb.py)."""

from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from exflow.errors import InputError
from exflow.placement.formats.exporters.sidecar import ModelShape
from exflow.placement.formats.importers.foreign import ForeignMap, check_every_expert_placed, fields
from exflow.placement.plan.logical_maps import logical_maps

_NAMES = ("physical_to_logical_map", "logical_to_physical_map", "expert_count")
_SHORT_NAMES = ("phy2log", "log2phy", "logcnt")  # of the example in EPLB's README
_REMEDY = "save what rebalance_experts returned"


def read_eplb(content: bytes, model: ModelShape) -> ForeignMap:
    """The map [L, P]. The two other tensors must agree with it; an expert's slots may be in any order."""
    try:
        tensors = load(content)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that numpy does not have
        reason = " ".join(str(error).split())
        raise InputError(f"is no safetensors file of integers ({reason}); {_REMEDY}") from error
    names = _SHORT_NAMES if _SHORT_NAMES[0] in tensors else _NAMES
    values = fields("the file", tensors, names)
    slots, physical, count = (_integers(name, each) for name, each in zip(names, values, strict=True))
    if slots.ndim != 2 or len(slots) != model.num_layers or not slots.size or slots.min() < 0:
        raise InputError(
            f"{names[0]}: has the shape {slots.shape}, or negative ids; give a row of ids from 0 up for "
            f"each of {model.num_layers} MoE layers"
        )
    check_every_expert_placed(slots, model)
    width = physical.shape[2] if physical.shape[:-1] == (len(slots), model.num_experts) else 0
    expected, expected_count = logical_maps(slots, model.num_experts, width)
    physical = _signed(physical, values[1].dtype, slots.shape[1])
    if not width or not np.array_equal(np.sort(physical), np.sort(expected)):
        raise InputError(f"{names[1]}: does not say the same as {names[0]}; {_REMEDY}")
    if not np.array_equal(count, expected_count):
        raise InputError(f"{names[2]}: does not say the same as {names[0]}; {_REMEDY}")
    return ForeignMap(slots)


def is_eplb(content: bytes) -> bool:
    """True if the header of a safetensors file names the map."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    named = any(f'"{names[0]}"'.encode() in header for names in (_NAMES, _SHORT_NAMES))
    return len(header) == length and header.startswith(b"{") and named


def _integers(name: str, value: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if not np.issubdtype(value.dtype, np.integer):
        raise InputError(f"{name}: is {value.dtype}; give integers")
    return value.astype(np.int64)


def _signed(physical: npt.NDArray[np.int64], dtype: np.dtype[Any], num_slots: int) -> npt.NDArray[np.int64]:
    """The map with -1 as padding, also where an unsigned dtype has stored -1 as its largest number."""
    padding = np.iinfo(dtype).max
    return np.where((physical == padding) & (padding >= num_slots), -1, physical)
