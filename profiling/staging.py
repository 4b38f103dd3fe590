"""Copies recorded rows from the accelerators to host memory without making the model wait."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exflow.errors import WrongResult
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.sequences import PADDING, SequenceNumbers
from exflow.profiling.shard import Rows

_CAPACITY = 8192  # rows: a fraction of a second of work, a few MB of pinned memory

Named = dict[str, Tensor]


@dataclass
class _Buffer:
    """Host tensors with room for _CAPACITY rows, of which `filled` are; complete once `copied` has passed.

    `rows` [capacity] is what a row has once, `choices` [capacity, layers, k] what it has in each layer, for
    the layers of each device.
    """

    rows: Named
    choices: list[Named]
    filled: int = 0
    copied: list[torch.cuda.Event] = field(default_factory=list)


class Staging:
    """Two host buffers that collect forward passes in turn and hand them on as numpy rows.

    On CUDA the buffers are pinned and filled by asynchronous copies. When one is full the other is handed on,
    whose copies were started a whole buffer ago, so the host does not wait for the pass at hand. A pass costs
    a handful of launches on each device that has layers, whatever their number.
    """

    def __init__(
        self,
        layout: RoutingLayout,
        weights: bool,
        devices: Sequence[torch.device],
        sink: Callable[[Rows], None],
    ) -> None:
        """Create both buffers. devices: the device of each MoE layer."""
        id_dtype = torch.uint8 if layout.id_dtype == np.uint8 else torch.uint16
        self._choice_dtypes = {"experts": id_dtype} | ({"weights": torch.float16} if weights else {})
        self._row_dtypes = {
            "sequence": torch.int64,
            "position": torch.int32,
            "phase": torch.uint8,
            "finite": torch.bool,
        }
        self._layers = [[layer for layer, at in enumerate(devices) if at == each] for each in set(devices)]
        self._pinned = any(device.type == "cuda" for device in devices)
        self._filling, self._full = self._new_buffer(layout.top_k), self._new_buffer(layout.top_k)
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
        """Add T rows: `ids` and `weights` hold a tensor [T, k] for each MoE layer, the others are [T].

        Rows whose sequence is PADDING are dropped, on the host, so that no device is asked for their number.
        Raises WrongResult, once rows are handed on, for a token whose weights in the last layer are not
        finite: there everything arrives that was NaN or infinite before.
        """
        given = {"experts": ids, "weights": weights}
        choices = [
            {name: self._stacked(given[name], layers, dtype) for name, dtype in self._choice_dtypes.items()}
            for layers in self._layers
        ]
        rows = {"sequence": sequence.to(torch.int64), "position": position.to(torch.int32)}
        rows["finite"] = weights[-1].isfinite().all(dim=1)
        pieces = [rows, *choices]
        gpus = {tensor.device for named in pieces for tensor in named.values() if tensor.is_cuda}
        start, total = 0, len(sequence)
        while start < total:
            buffer = self._filling
            count = min(total - start, _CAPACITY - buffer.filled)
            here, taken = slice(buffer.filled, buffer.filled + count), slice(start, start + count)
            for kept, new in zip([buffer.rows, *buffer.choices], pieces, strict=True):
                for name, tensor in new.items():
                    kept[name][here].copy_(tensor[taken], non_blocking=True)
            buffer.rows["phase"][here] = phase
            buffer.copied = [torch.cuda.current_stream(device).record_event() for device in gpus]
            start += count
            buffer.filled += count
            if buffer.filled == _CAPACITY:
                self._hand_on(self._full)
                self._filling, self._full = self._full, self._filling

    def flush(self) -> None:
        """Wait for the copies under way, and hand on everything collected."""
        self._hand_on(self._full)
        self._hand_on(self._filling)

    def _new_buffer(self, top_k: int) -> _Buffer:
        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((_CAPACITY, *shape), dtype=dtype, pin_memory=self._pinned)

        return _Buffer(
            rows={name: empty(dtype) for name, dtype in self._row_dtypes.items()},
            choices=[
                {name: empty(dtype, len(layers), top_k) for name, dtype in self._choice_dtypes.items()}
                for layers in self._layers
            ],
        )

    def _stacked(self, tensors: Sequence[Tensor], layers: list[int], dtype: torch.dtype) -> Tensor:
        return torch.stack([tensors[layer] for layer in layers], dim=1).to(dtype)

    def _hand_on(self, buffer: _Buffer) -> None:
        for event in buffer.copied:
            event.synchronize()
        taken, buffer.filled = slice(buffer.filled), 0
        real = buffer.rows["sequence"][taken].numpy() != PADDING
        if not real.any():
            return
        rows: Rows = {name: tensor[taken].numpy()[real] for name, tensor in buffer.rows.items()}
        for name in self._choice_dtypes:
            parts = [named[name][taken].numpy()[real] for named in buffer.choices]
            rows[name] = parts[0] if len(parts) == 1 else self._merged(parts)
        rows["sequence"] = self._numbers.renumber(rows["sequence"], rows["position"])
        _check_finite(rows)
        self._sink(rows)

    def _merged(self, parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The choices [rows, L, k] from those of each device's layers."""
        rows, _, top_k = parts[0].shape
        whole = np.empty((rows, sum(map(len, self._layers)), top_k), parts[0].dtype)
        for layers, part in zip(self._layers, parts, strict=True):
            whole[:, layers] = part
        return whole


def _check_finite(rows: Rows) -> None:
    finite = rows.pop("finite")
    if not finite.all():
        row = int(finite.argmin())
        sequence, position = rows["sequence"][row], rows["position"][row]
        raise WrongResult(
            f"sequence {sequence}, position {position}: the gate's weights are NaN or infinite, so that its "
            "routing means nothing; try float32, or another checkpoint"
        )
