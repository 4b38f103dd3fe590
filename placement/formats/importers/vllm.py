"""The map that proposals for vLLM read (see exporters/vllm.py)."""

import numpy as np

from exflow.placement.formats.exporters.sidecar import ModelShape
from exflow.placement.formats.importers.foreign import ForeignMap, expert_ids, items, parsed_json, table


def read_vllm(content: bytes, model: ModelShape) -> ForeignMap:
    """A row for each MoE layer, or one row, not in a list of its own, for all of them."""
    rows = parsed_json(content)
    if isinstance(rows, list) and rows and not isinstance(rows[0], list):
        row = expert_ids("the list", rows)
        return ForeignMap(np.tile(np.array(row, dtype=np.int64), (model.num_layers, 1)))
    rows = items("the list", rows, model.num_layers, "MoE layer")
    return ForeignMap(table({f"MoE layer {layer}": row for layer, row in enumerate(rows)}))


def is_vllm(content: bytes) -> bool:
    return content.lstrip().startswith(b"[")
