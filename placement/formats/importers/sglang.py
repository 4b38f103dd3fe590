"""SGLang's --init-expert-location (see exporters/sglang.py). Only its JSON; a .pt file would be a pickle."""

from exflow.placement.formats.exporters.sidecar import ModelShape
from exflow.placement.formats.importers.foreign import ForeignMap, fields, items, parsed_json, table

_KEY = "physical_to_logical_map"


def read_sglang(content: bytes, model: ModelShape) -> ForeignMap:
    """The rows of the MoE layers; those of dense layers, which mean nothing, only have to be rows."""
    (rows,) = fields("the file", parsed_json(content), (_KEY,))
    rows = items(_KEY, rows, model.num_hidden_layers, "hidden layer, dense ones too")
    slots = table({f"{_KEY}[{layer}]": row for layer, row in enumerate(rows)})
    return ForeignMap(slots[list(model.moe_layer_ids)])


def is_sglang(content: bytes) -> bool:
    return content.lstrip().startswith(b"{") and b'"physical_to_logical_map"' in content
