"""The way of recorded rows from the accelerator to host memory, without making the model wait."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exflow.profiling.layout import RoutingLayout
from exflow.profiling.sequences import SequenceNumbers
from exflow.profiling.shard import Rows

_CAPACITY = 8192  # rows: a fraction of a second of work, a few MB of pinned memory


@dataclass
class _Buffer:
    """Host tensors with room for _CAPACITY rows, of which `filled` are; complete once `copied` has passed."""

    tensors: dict[str, Tensor]
    filled: int = 0
    copied: torch.cuda.Event | None = None


class Staging:
    """Two host buffers that collect forward passes in turn and hand them on as numpy rows.

    On CUDA the buffers are pinned and filled by asynchronous copies. When one is full the other is handed on,
    whose copies were started a whole buffer ago, so the host does not wait for the pass at hand. A pass costs
    a handful of launches, whatever its number of layers.
    """

    def __init__(
        self, layout: RoutingLayout, weights: bool, device: torch.device, sink: Callable[[Rows], None]
    ) -> None:
        choices = (_CAPACITY, layout.num_layers, layout.top_k)
        id_dtype = torch.uint8 if layout.id_dtype == np.uint8 else torch.uint16
        self._dtypes = {
            "experts": id_dtype,
            "sequence": torch.int64,
            "position": torch.int32,
            "phase": torch.uint8,
        }
        if weights:
            self._dtypes["weights"] = torch.float16
        self._device = device
        self._on_gpu = device.type == "cuda"
        shapes = {"experts": choices, "weights": choices}
        self._filling, self._full = (
            _Buffer(
                {
                    name: torch.empty(shapes.get(name, (_CAPACITY,)), dtype=dtype, pin_memory=self._on_gpu)
                    for name, dtype in self._dtypes.items()
                }
            )
            for _ in range(2)
        )
        self._numbers = SequenceNumbers()
        self._sink = sink

    @torch.inference_mode()
    def add_pass(
        self,
        ids: Sequence[Tensor],
        weights: Sequence[Tensor],
        sequence: Tensor,
        position: Tensor,
        phase: int,
    ) -> None:
        """Add T rows: `ids` and `weights` hold a tensor [T, k] for each MoE layer, the others are [T]."""
        rows = {"experts": torch.stack(list(ids), dim=1), "sequence": sequence, "position": position}
        if "weights" in self._dtypes:
            rows["weights"] = torch.stack(list(weights), dim=1)
        rows = {name: tensor.to(self._dtypes[name]) for name, tensor in rows.items()}
        start, total = 0, len(sequence)
        while start < total:
            buffer = self._filling
            count = min(total - start, _CAPACITY - buffer.filled)
            here = slice(buffer.filled, buffer.filled + count)
            for name, tensor in rows.items():
                buffer.tensors[name][here].copy_(tensor[start : start + count], non_blocking=True)
            buffer.tensors["phase"][here] = phase
            if self._on_gpu:
                buffer.copied = torch.cuda.current_stream(self._device).record_event()
            start += count
            buffer.filled += count
            if buffer.filled == _CAPACITY:
                self._hand_on(self._full)
                self._filling, self._full = self._full, self._filling

    def flush(self) -> None:
        """Wait for the copies under way, and hand on everything collected."""
        self._hand_on(self._full)
        self._hand_on(self._filling)

    def _hand_on(self, buffer: _Buffer) -> None:
        if not buffer.filled:
            return
        if buffer.copied is not None:
            buffer.copied.synchronize()
        rows = {name: tensor[: buffer.filled].numpy().copy() for name, tensor in buffer.tensors.items()}
        rows["sequence"] = self._numbers.renumber(rows["sequence"], rows["position"])
        buffer.filled = 0
        self._sink(rows)
