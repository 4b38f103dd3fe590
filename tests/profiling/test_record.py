"""record(): from a model's announcements to a trace."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from exflow.errors import InputError, WrongResult
from exflow.profiling.listener import Recordable, RoutingListener
from exflow.profiling.record import RoutingLayout, record
from exflow.profiling.sequences import PADDING
from exflow.profiling.shard import Rows, concatenate
from exflow.profiling.staging import Staging
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace


class FakeModel:
    """Routes at random, and remembers in plain numpy what it announced."""

    def __init__(self, num_experts: int = 8, layers: int = 3, top_k: int = 2, device: str = "cpu") -> None:
        self.layout = RoutingLayout("fake", layers + 1, tuple(range(1, layers + 1)), num_experts, top_k)
        self.listeners: list[RoutingListener] = []
        self.generator = torch.Generator().manual_seed(0)
        self.device = device
        self.passes: list[np.ndarray[Any, Any]] = []

    def routing_layout(self) -> RoutingLayout:
        return self.layout

    def add_routing_listener(self, listener: RoutingListener) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def forward(
        self, sequence: list[int], position: list[int], phase: int, fail_at: int | None = None
    ) -> None:
        shape = (len(sequence), self.layout.top_k)
        where = torch.tensor(sequence, device=self.device), torch.tensor(position, device=self.device)
        ids = [
            torch.randint(self.layout.num_experts, shape, generator=self.generator)
            for _ in self.layout.moe_layer_ids
        ]
        for layer, layer_ids in enumerate(ids):
            if layer == fail_at:
                raise RuntimeError("out of memory")
            weights = torch.full(shape, 0.5, requires_grad=True)
            for listener in self.listeners:
                listener(layer, layer_ids.to(self.device), weights.to(self.device), *where, phase)
        self.passes.append(np.stack([layer_ids.numpy() for layer_ids in ids], axis=1))

    def generate(self, batch: int, steps: int) -> None:
        for sequence in range(batch):
            self.forward([sequence] * 3, [0, 1, 2], PREFILL)
        for step in range(3, 3 + steps):
            self.forward(list(range(batch)), [step] * batch, DECODE)


def check_announced(model: FakeModel, trace: RoutingTrace) -> None:
    assert trace.layout == model.layout
    np.testing.assert_array_equal(trace.experts, np.concatenate(model.passes))


@pytest.mark.parametrize("num_experts", [8, 300])
@pytest.mark.parametrize("to_disk", [False, True])
def test_the_trace_is_what_the_model_announced(tmp_path: Path, to_disk: bool, num_experts: int) -> None:
    model = FakeModel(num_experts)
    with record(model, tmp_path / "t" if to_disk else None, weights=True) as recorder:
        model.generate(batch=2, steps=2)
    trace = recorder.trace
    assert model.listeners == []
    check_announced(model, trace)
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 0, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4, 4]
    assert trace.phase.tolist() == [PREFILL] * 6 + [DECODE] * 4
    assert trace.weights is not None
    assert (trace.weights == 0.5).all()
    assert isinstance(trace.experts, np.memmap) == to_disk


def test_weights_are_left_out_unless_asked_for() -> None:
    model = FakeModel()
    with record(model) as recorder:
        model.generate(batch=1, steps=1)
    assert recorder.trace.weights is None


@pytest.mark.parametrize("weights", [True, False])
def test_routing_by_weights_that_are_not_finite_is_refused(weights: bool) -> None:
    """Recorded or not: choices among NaN mean nothing. Padding may hold anything."""
    layout = RoutingLayout("broken", 2, (0, 1), 8, 2)
    kept: list[Rows] = []
    staging = Staging(layout, weights, [torch.device("cpu")] * 2, kept.append)
    ids, given = torch.ones(3, 2, dtype=torch.int64), torch.full((3, 2), 0.5)
    broken = given.clone()
    broken[1, 0] = torch.nan
    staging.add_pass([ids] * 2, [given, broken], torch.tensor([4, PADDING, 7]), torch.zeros(3), PREFILL)
    staging.flush()
    assert len(kept[0]["experts"]) == 2
    broken[1, 0] = torch.inf
    staging.add_pass([ids] * 2, [given, broken], torch.tensor([4, 7, 8]), torch.ones(3), DECODE)
    with pytest.raises(WrongResult, match="sequence 1, position 1: the gate's weights are NaN or infinite"):
        staging.flush()
    assert len(kept) == 1


def test_works_in_inference_mode_and_out_of_it() -> None:
    model = FakeModel()
    with record(model) as recorder:
        with torch.inference_mode():
            model.forward([0], [0], PREFILL)
        model.forward([0], [1], DECODE)
    check_announced(model, recorder.trace)


def test_passes_larger_than_the_buffer_and_many_small_ones(tmp_path: Path) -> None:
    model = FakeModel(layers=1, top_k=1)
    with record(model, tmp_path / "t", shard_tokens=5000) as recorder:
        model.forward([0] * 20_000, list(range(20_000)), PREFILL)
        for step in range(20_000, 20_050):
            model.forward([0], [step], DECODE)
    check_announced(model, recorder.trace)


def test_engines_that_count_sequences_anew_in_each_call() -> None:
    model = FakeModel()
    with record(model) as recorder:
        model.generate(batch=2, steps=1)
        model.generate(batch=2, steps=0)
    assert recorder.trace.sequence.tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 2, 2, 2, 3, 3, 3]


def test_an_exception_keeps_every_whole_pass(tmp_path: Path) -> None:
    model = FakeModel()
    with pytest.raises(RuntimeError, match="out of memory"), record(model, tmp_path / "t") as recorder:
        model.forward([0, 0], [0, 1], PREFILL)
        model.forward([0], [2], DECODE, fail_at=2)
    assert model.listeners == []
    check_announced(model, recorder.trace)


def test_a_stop_before_the_rows_are_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = FakeModel(), FakeModel()
    with record(before, tmp_path / "t"):
        before.generate(batch=2, steps=2)

    def stopped(staging: Staging) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "flush", stopped)
    with pytest.raises(KeyboardInterrupt), record(after, tmp_path / "t"):
        after.generate(batch=2, steps=2)
    check_announced(before, RoutingTrace.load(tmp_path / "t"))


def test_a_pass_that_was_cut_short_and_tried_again_counts_once() -> None:
    model = FakeModel()
    with record(model) as recorder:
        with pytest.raises(RuntimeError, match="out of memory"):
            model.forward([0], [0], PREFILL, fail_at=1)
        model.forward([0], [0], PREFILL)
    check_announced(model, recorder.trace)


def test_ids_outside_the_layout_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(num_experts=8)
    monkeypatch.setattr(model, "routing_layout", lambda: replace(model.layout, num_experts=4))
    message = "experts: holds 7; values must be from 0 to 3"
    with pytest.raises(InputError, match=f"t: {message}"), record(model, tmp_path / "t"):
        model.generate(batch=4, steps=4)
    assert model.listeners == []
    with record(model) as recorder:
        model.generate(batch=4, steps=4)
    with pytest.raises(InputError, match=message):
        _ = recorder.trace


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_recording_without_tokens_says_so(tmp_path: Path, to_disk: bool) -> None:
    with record(FakeModel(), tmp_path / "t" if to_disk else None) as recorder:
        pass
    with pytest.raises(InputError, match="the trace holds no tokens"):
        _ = recorder.trace


def test_the_trace_is_read_after_the_block() -> None:
    with (
        pytest.raises(InputError, match="read inside the with block; read it after"),
        record(FakeModel()) as recorder,
    ):
        _ = recorder.trace


def test_a_model_that_announces_nothing_is_refused() -> None:
    message = (
        "record: str does not announce its routing; give an exflow or a Hugging Face model, or an object"
    )
    with pytest.raises(InputError, match=message), record(cast(Recordable, "model")):
        pass


def test_padding_is_left_out() -> None:
    model = FakeModel()
    with record(model, weights=True) as recorder:
        model.forward([PADDING, 0, 1, PADDING, 2], [0, 0, 0, 0, 0], PREFILL)
        model.forward([PADDING, PADDING], [1, 1], PREFILL)
        model.forward([0, PADDING, 2], [1, 0, 1], DECODE)
    kept = np.concatenate(model.passes)[[1, 2, 4, 7, 9]]
    np.testing.assert_array_equal(recorder.trace.experts, kept)
    assert recorder.trace.sequence.tolist() == [0, 1, 2, 0, 2]
    assert recorder.trace.position.tolist() == [0, 0, 0, 1, 1]


def test_layers_may_be_on_several_devices() -> None:
    """Torch takes "cpu" and "cpu:0" for two devices, though they share one memory."""
    layout = RoutingLayout("spread", 4, (0, 1, 2, 3), 8, 2)
    devices = [torch.device(name) for name in ("cpu", "cpu:0", "cpu:0", "cpu")]
    ids = [torch.full((3, 2), layer) for layer in range(4)]
    weights = [torch.full((3, 2), 0.25 * layer) for layer in range(4)]
    kept: list[Rows] = []
    staging = Staging(layout, True, devices, kept.append)
    staging.add_pass(ids, weights, torch.arange(3), torch.zeros(3), PREFILL)
    staging.flush()
    (rows,) = kept
    assert rows["experts"].tolist() == [[[layer, layer] for layer in range(4)]] * 3
    assert rows["weights"].tolist() == [[[0.25 * layer] * 2 for layer in range(4)]] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_layers_on_a_gpu_and_on_the_host() -> None:
    layout = RoutingLayout("spread", 2, (0, 1), 8, 2)
    ids = [torch.randint(8, (20_000, 2)) for _ in range(2)]
    kept: list[Rows] = []
    staging = Staging(layout, False, [torch.device("cpu"), torch.device("cuda", 0)], kept.append)
    staging.add_pass([ids[0], ids[1].cuda()], ids, torch.arange(20_000).cuda(), torch.zeros(20_000), PREFILL)
    staging.flush()
    np.testing.assert_array_equal(concatenate(kept)["experts"], torch.stack(ids, dim=1))


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    """The trace is 20 MB; of it only a shard and the stage are ever in memory."""
    model = FakeModel(layers=50, top_k=4)
    ids = torch.zeros(1000, 4, dtype=torch.int64)
    with record(model, tmp_path / "t", shard_tokens=1000):
        (listener,) = model.listeners
        tracemalloc.start()
        for step in range(100):
            position = torch.arange(1000 * step, 1000 * (step + 1))
            for layer in range(50):
                listener(layer, ids, ids, torch.zeros(1000, dtype=torch.int64), position, DECODE)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert RoutingTrace.load(tmp_path / "t").num_tokens == 100_000
    assert peak < 5_000_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_not_waited_for_while_a_buffer_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = 0
    flush = Staging.flush

    def counted(staging: Staging) -> None:
        nonlocal flushes
        flushes += 1
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        flush(staging)
        torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(Staging, "flush", counted)
    model = FakeModel(num_experts=300, device="cuda")
    ids = torch.randint(300, (50, 3, 64, 2), device="cuda")
    position = torch.arange(50, device="cuda")
    sequence = torch.arange(64, device="cuda")
    with record(model, weights=True) as recorder:
        (listener,) = model.listeners
        listener_weights = torch.ones(64, 2, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for repeat in range(4):
                for step in range(50):
                    where = position[step].expand(64) + 50 * repeat
                    for layer in range(3):
                        listener(layer, ids[step, layer], listener_weights, sequence, where, DECODE)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected = ids.permute(0, 2, 1, 3).reshape(-1, 3, 2).repeat(4, 1, 1)
    np.testing.assert_array_equal(recorder.trace.experts, expected.cpu().numpy())
    assert flushes == 1  # 12,800 rows: a full buffer of 8,192 waits for the next, so only the end waits
