"""The way of recorded rows from the accelerator to host memory, without making the model wait."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from exflow.profiling.layout import RoutingLayout
from exflow.profiling.sequences import SequenceNumbers
from exflow.profiling.shard import Rows

_CAPACITY = 8192  # rows: a fraction of a second of work, a few MB of pinned memory


class Staging:
    """A host buffer of fixed size that collects whole forward passes and hands them on as numpy rows.

    On CUDA the buffer is pinned and filled by asynchronous copies; the host waits for them once each time
    the buffer is full, never in a pass. A pass costs a handful of launches, whatever its number of layers.
    """

    def __init__(
        self, layout: RoutingLayout, weights: bool, device: torch.device, sink: Callable[[Rows], None]
    ) -> None:
        choices = (_CAPACITY, layout.num_layers, layout.top_k)
        id_dtype = torch.uint8 if layout.id_dtype == np.uint8 else torch.uint16
        tensors = {
            "experts": (choices, id_dtype),
            "sequence": ((_CAPACITY,), torch.int64),
            "position": ((_CAPACITY,), torch.int32),
            "phase": ((_CAPACITY,), torch.uint8),
        }
        if weights:
            tensors["weights"] = (choices, torch.float16)
        self._device = device
        self._on_gpu = device.type == "cuda"
        with torch.inference_mode():
            self._buffer = {
                name: torch.empty(shape, dtype=dtype, pin_memory=self._on_gpu)
                for name, (shape, dtype) in tensors.items()
            }
        self._copied: torch.cuda.Event | None = None
        self._filled = 0
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
        if "weights" in self._buffer:
            rows["weights"] = torch.stack(list(weights), dim=1)
        rows = {name: tensor.to(self._buffer[name].dtype) for name, tensor in rows.items()}
        start, total = 0, len(sequence)
        while start < total:
            count = min(total - start, _CAPACITY - self._filled)
            here = slice(self._filled, self._filled + count)
            for name, tensor in rows.items():
                self._buffer[name][here].copy_(tensor[start : start + count], non_blocking=True)
            self._buffer["phase"][here] = phase
            if self._on_gpu:
                self._copied = torch.cuda.current_stream(self._device).record_event()
            start += count
            self._filled += count
            if self._filled == _CAPACITY:
                self.flush()

    def flush(self) -> None:
        """Wait for the copies under way, and hand the rows collected so far to the sink."""
        if not self._filled:
            return
        if self._copied is not None:
            self._copied.synchronize()
        rows = {name: tensor[: self._filled].numpy().copy() for name, tensor in self._buffer.items()}
        rows["sequence"] = self._numbers.renumber(rows["sequence"], rows["position"])
        self._filled = 0
        self._sink(rows)
