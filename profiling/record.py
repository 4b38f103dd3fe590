"""record(model): a context manager that writes down which experts each token visits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exflow.errors import InputError
from exflow.profiling.layout import RoutingLayout as RoutingLayout
from exflow.profiling.listener import Recordable
from exflow.profiling.shard import Rows, concatenate
from exflow.profiling.trace import RoutingTrace
from exflow.profiling.writer import SHARD_TOKENS, TraceWriter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exflow.profiling.staging import Staging


class Recorder:
    """Collects the passes of a recording; `trace` holds them once the `with` block is left."""

    def __init__(self, layout: RoutingLayout, path: Path | None, weights: bool, **writing: Any) -> None:
        """Prepare a recording. writing: options of the TraceWriter, where there is a path."""
        self._layout = layout
        self._path = path
        self._weights = weights
        self._writer = None if path is None else TraceWriter(path, layout, has_weights=weights, **writing)
        self._blocks: list[Rows] = []
        self._staging: Staging | None = None
        self._pass_ids: list[Tensor] = []
        self._pass_weights: list[Tensor] = []
        self._open = True

    @property
    def resumed(self) -> int:
        """The number of sequences that were recorded before; the next sequence gets this number."""
        return 0 if self._writer is None else self._writer.resumed

    @property
    def trace(self) -> RoutingTrace:
        """The recording: memory-mapped from its path, or in memory. InputError if it holds no tokens."""
        if self._open:
            raise InputError("record: the trace is read inside the with block; read it after the block")
        if self._path is not None:
            return RoutingTrace.load(self._path)
        if not self._blocks:
            raise InputError("record: the trace holds no tokens; run the model inside the with block")
        return RoutingTrace.from_rows(concatenate(self._blocks), self._layout)

    def listen(
        self,
        layer: int,
        expert_ids: "Tensor",
        weights: "Tensor",
        sequence: "Tensor",
        position: "Tensor",
        phase: int,
    ) -> None:
        """A RoutingListener: keeps the layers of a pass, and stages the rows when the last has come."""
        if layer == 0:  # also after a pass that an exception cut short: only whole passes count
            self._pass_ids, self._pass_weights = [], []
        assert layer == len(self._pass_ids), f"MoE layer {layer} came after {len(self._pass_ids)} layers"
        self._pass_ids.append(expert_ids)
        self._pass_weights.append(weights)
        if layer == self._layout.num_layers - 1:
            staging = self._staging or self._start()
            staging.add_pass(self._pass_ids, self._pass_weights, sequence, position, phase)
            self._pass_ids, self._pass_weights = [], []

    def close(self, cut_short: bool = False) -> None:
        """Complete the trace with the whole passes seen so far; `cut_short` is as for TraceWriter.close."""
        self._open = False
        try:
            if self._staging is not None:
                self._staging.flush()
        except BaseException:  # a signal, say: without its rows the recording must not replace what was there
            cut_short = True
            raise
        finally:
            if self._writer is not None:
                self._writer.close(cut_short)

    def _start(self) -> "Staging":
        from exflow.profiling.staging import Staging  # torch is loaded only where a model runs

        sink = self._blocks.append if self._writer is None else self._write
        devices = [ids.device for ids in self._pass_ids]  # a model may be spread over several
        self._staging = Staging(self._layout, self._weights, devices, sink)
        return self._staging

    def _write(self, rows: Rows) -> None:
        assert self._writer is not None
        rows["sequence"] += self._writer.resumed
        self._writer.append(rows)


@contextmanager
def record(
    model: "Recordable | nn.Module",
    path: str | Path | None = None,
    *,
    weights: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    source: str | None = None,
    resume: bool = False,
) -> Iterator[Recorder]:
    """Record the routing of every forward pass of `model` inside the block.

        with record(model, "trace") as recorder:
            model.generate(...)
        trace = recorder.trace

    `model` is one of ours, or a Hugging Face model (docs/profiling.md). With a `path` the trace is written
    there as it grows, so memory stays bounded and a stop keeps what is complete; an exception in the block
    keeps every whole pass. Without one it is collected in memory. `weights` records the gate's weights too,
    at three times the size. Sequences are numbered in order of appearance; an id that starts again from an
    earlier position counts as a new sequence.

    `source` and `resume` are as for TraceWriter: `recorder.resumed` sequences are then there already, and
    those after them are to be run.

    Raises InputError if the model does not announce its routing and has no experts to listen to, or if `path`
    holds anything but a trace.
    """
    announcer = model if isinstance(model, Recordable) else _listened_to(model)
    target = None if path is None else Path(path)
    writing = {"shard_tokens": shard_tokens, "source": source, "resume": resume}
    recorder = Recorder(announcer.routing_layout(), target, weights, **writing)
    remove = announcer.add_routing_listener(recorder.listen)
    cut_short = True
    try:
        yield recorder
        cut_short = False
    finally:
        remove()
        recorder.close(cut_short)


def _listened_to(model: "nn.Module") -> Recordable:
    """A torch model whose experts are listened to, since it does not announce its routing by itself."""
    from torch import nn  # loaded only where a model runs

    if not isinstance(model, nn.Module):
        raise InputError(
            f"record: {type(model).__name__} does not announce its routing; give an exflow or a Hugging Face "
            "model, or an object with routing_layout() and add_routing_listener()"
        )
    from exflow.profiling.hugging_face import HuggingFaceRouting

    return HuggingFaceRouting(model)
