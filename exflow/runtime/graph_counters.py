"""Counters of captured decode steps, from what the kernels counted on the device."""

from typing import TYPE_CHECKING

from exflow.comm.buffers import words_of
from exflow.comm.collectives import Counters

if TYPE_CHECKING:
    from exflow.runtime.graph_runner import CapturedDecode


def counters_of(captured: "CapturedDecode", steps: int) -> Counters:
    """Messages and bytes that this rank sent in the `steps` steps since the captured step's `begin`."""
    shape, step = captured.shape, captured.step
    config, outputs = captured.capture.decoder.config, step.outputs
    layers, itemsize = len(config.moe_layer_ids), captured.cache.dtype.itemsize
    hidden = config.hidden_size * itemsize
    if shape.num_ranks == 1:
        return Counters()
    if shape.replicated:
        sums = int(outputs.returned.sum())
        wire_bytes = _wire_bytes(captured, steps, sums * (hidden + 4))
        return Counters(all_reduces=steps * layers, wire_bytes=wire_bytes)
    dispatch, returned = outputs.dispatched.sum(0).tolist(), outputs.returned.sum(0).tolist()
    dispatch[0] += int(outputs.passed.sum())
    near = min(shape.group_size, shape.ranks_per_node) - 1
    tokens = int(outputs.attended.sum())
    kv = tokens * (shape.group_size - 1) * config.kv_width * itemsize
    counted = slice(1 if shape.relayed else 2)  # between nodes whole chunks travel
    moved = sum(dispatch[counted]) * (hidden + 4 * words_of(config.top_k))
    moved += sum(returned[counted]) * (hidden + 4) + (0 if step.share else kv)
    exchanges = (2 if captured.capture.returns else 1) * (2 if shape.relayed else 1)
    return Counters(
        all_to_alls=steps * layers * exchanges,
        gathers=steps if step.share is not None else 0,
        dispatch_intra=dispatch[0],
        dispatch_inter=dispatch[1],
        return_intra=returned[0],
        return_inter=returned[1],
        kv_intra=tokens * near,
        kv_inter=tokens * (shape.group_size - 1 - near),
        hidden_bytes=(sum(dispatch) + sum(returned)) * hidden,
        kv_bytes=kv,
        wire_bytes=_wire_bytes(captured, steps, moved),
    )


def _wire_bytes(captured: "CapturedDecode", steps: int, moved: int) -> int:
    """Bytes that left this rank. moved: bytes written to peers; collectives add whole chunks."""
    shape, exchanges = captured.shape, captured.step.buffers.exchanges
    if shape.replicated:
        exchanges = exchanges[1:]  # no dispatch: every rank gates every token
    if captured.capture.transport == "collective":
        moved, a_layer = 0, sum(each.chunk for each in exchanges) * (shape.num_ranks - 1)
    else:
        a_layer = sum(each.off_node.wire_bytes for each in exchanges if each.off_node)
    new_kv = captured.step.work.new_kv.nbytes * (shape.group_size - 1)  # empty if caches are shared
    return moved + steps * (a_layer * len(captured.capture.decoder.config.moe_layer_ids) + new_kv)
