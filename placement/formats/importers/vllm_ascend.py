"""vllm-ascend's expert map (see exporters/vllm_ascend.py), recorded by it or made for it."""

from itertools import chain
from typing import Any

from exflow.errors import InputError
from exflow.placement.formats.exporters.sidecar import ModelShape
from exflow.placement.formats.importers.foreign import (
    ForeignMap,
    expert_ids,
    fields,
    items,
    number,
    parsed_json,
    table,
)

_POSITION = "its place in the list; the engine goes by places: put them in order"


def read_vllm_ascend(content: bytes, model: ModelShape) -> ForeignMap:
    """The devices' lists one after another; all must have equally many slots."""
    count, layers = fields("the file", parsed_json(content), ("moe_layer_count", "layer_list"))
    number("moe_layer_count", count, model.num_layers, "the number of the model's MoE layers; give its map")
    layers = items("layer_list", layers, model.num_layers, "MoE layer")
    devices = [_devices(f"layer_list[{layer}]", layer, value) for layer, value in enumerate(layers)]
    for layer, placed in enumerate(devices):
        if len(placed) != len(devices[0]):
            raise InputError(
                f"layer_list[{layer}]: has {len(placed)} devices, others {len(devices[0])}; give all as many"
            )
    rows = {f"layer_list[{layer}]": list(chain(*placed)) for layer, placed in enumerate(devices)}
    return ForeignMap(table(rows), num_ranks=len(devices[0]))


def is_vllm_ascend(content: bytes) -> bool:
    return content.lstrip().startswith(b"{") and b'"layer_list"' in content


def _devices(name: str, layer: int, value: Any) -> list[list[int]]:
    """The experts of each device of one layer."""
    layer_id, count, devices = fields(name, value, ("layer_id", "device_count", "device_list"))
    number(f"{name}.layer_id", layer_id, layer, _POSITION)
    if not isinstance(devices, list) or not devices:
        raise InputError(f"{name}.device_list: holds no devices; give one at least")
    number(f"{name}.device_count", count, len(devices), "the length of device_list; make them agree")
    placed: list[list[int]] = []
    for rank, device in enumerate(devices):
        here = f"{name}.device_list[{rank}]"
        device_id, experts = fields(here, device, ("device_id", "device_expert"))
        number(f"{here}.device_id", device_id, rank, _POSITION)
        placed.append(expert_ids(f"{here}.device_expert", experts, len(placed[0]) if placed else None))
    return placed
