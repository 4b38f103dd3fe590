"""Times captured decode steps: a batch in the middle of its decode, with routing that a trace may dictate.

Prompts are not run: the cache is filled with noise, which costs as much time as real keys and values.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from exflow.bench.job import WARM_UP
from exflow.model.decoder import Decoder, Rows
from exflow.model.sampling import GREEDY
from exflow.profiling.trace import DECODE
from exflow.runtime.decode_step import DecodeStep
from exflow.runtime.graph_counters import counters_of
from exflow.runtime.graph_runner import Capture, CapturedDecode


@dataclass(frozen=True)
class StepTimes:
    """Microseconds of a step on the slowest rank: median and 99th percentile."""

    median_us: float
    p99_us: float

    @classmethod
    def of(cls, times_us: list[float], num_ranks: int) -> "StepTimes":
        """Combine the step times of all ranks. times_us: this rank's steps. Collective."""
        slowest = torch.tensor(times_us, device="cuda")
        if num_ranks > 1:
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return cls(*np.percentile(slowest.cpu().numpy(), (50, 99)).tolist())


@torch.inference_mode()
def decode_synthetic_batch(
    capture: Capture, batch: int, context: int, steps: int, kind: type[DecodeStep] = DecodeStep
) -> CapturedDecode:
    """Capture a step, and begin it with `batch` sequences of `context` tokens each. Collective."""
    captured = capture.make(batch, context + steps + 1, GREEDY, (), kind)
    captured.cache.normal_()
    begin_synthetic_batch(captured, batch, context)
    return captured


@torch.inference_mode()
def begin_synthetic_batch(captured: CapturedDecode, batch: int, context: int) -> None:
    """Begin `batch` sequences of `context` tokens each. Collective."""
    shape, device = captured.shape, captured.cache.device
    here = torch.arange(batch, device=device)
    if not shape.replicated:
        here = here[here % shape.num_ranks == shape.rank]
    rows = Rows(here, torch.full_like(here, context), DECODE)
    captured.begin(0, [context] * batch, here % captured.capture.decoder.config.vocab_size, rows)


@torch.inference_mode()
def time_steps(captured: CapturedDecode, steps: int) -> StepTimes:
    """Run `steps` steps after a warm-up; each is timed on the GPU. Collective."""
    for _ in range(WARM_UP):
        captured.advance()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        captured.advance()
        event.record()
    torch.cuda.synchronize()
    captured.check()
    times = [1000 * before.elapsed_time(after) for before, after in pairwise(events)]
    return StepTimes.of(times, captured.shape.num_ranks)


@dataclass(frozen=True)
class StepBytes:
    """Bytes that the latest step had to move, mean over ranks. The byte floor is the time of memory and wire.

    memory: weights of the touched experts, dense weights, keys and values read. wire: hidden states sent, on
    the critical path. background: new keys and values sent to other ranks.
    """

    memory: float
    wire: float
    background: float

    def floor_us(self, memory_gb_s: float, link_gb_s: float) -> float:
        return self.memory / memory_gb_s / 1e3 + self.wire / link_gb_s / 1e3


def step_bytes(captured: CapturedDecode, counted_steps: int) -> StepBytes:
    """Bytes of the latest step; wire and background are means over the steps since `begin`. Collective."""
    config, shape = captured.capture.decoder.config, captured.shape
    routing, position = captured.step.outputs.routing, captured.step.state.position
    size = captured.cache.dtype.itemsize
    # layers without experts read the caches of as many rows as layers with experts
    attended = float((routing[:, :, 0] >= 0).sum()) * config.num_hidden_layers / len(config.moe_layer_ids)
    kv = attended * config.positions_seen(int(position.max())) * config.kv_width * size
    touched = _touched(captured)
    counters = counters_of(captured, counted_steps)
    mine = torch.tensor(
        [
            kv + touched * config.expert_weights * size + dense_bytes(captured.capture.decoder),
            counters.hidden_bytes / counted_steps,
            counters.kv_bytes / counted_steps,
        ],
        dtype=torch.float64,
        device=captured.cache.device,
    )
    if shape.num_ranks > 1:
        dist.all_reduce(mine)
    return StepBytes(*(mine / shape.num_ranks).tolist())


def _touched(captured: CapturedDecode) -> int:
    """Number of slots of this rank with a row, over all layers of the latest step. Collective."""
    shape, step, tables = captured.shape, captured.step, captured.capture.tables
    routing = step.outputs.routing.long()
    asks = (
        torch.full_like(step.state.sequence, shape.rank)
        if not shape.replicated
        else step.state.sequence % shape.num_ranks
    )
    layer = torch.arange(len(routing), device=routing.device)[:, None, None]
    slot = tables.serving_slot[asks[None, :, None], layer, routing.clamp(min=0)]
    total = tables.slots_per_rank * shape.num_ranks
    seen = torch.zeros(len(routing), total + 1, dtype=torch.int32, device=routing.device)
    slot = torch.where(routing >= 0, slot, total).flatten(1)
    seen.scatter_(1, slot, 1)
    if shape.num_ranks > 1:
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    first = shape.rank * tables.slots_per_rank
    return int(seen[:, first : first + tables.slots_per_rank].sum())


def dense_bytes(decoder: Decoder) -> int:
    """Bytes of weights that every step reads on every rank: all but experts and embeddings, with the head."""
    weights = sum(
        parameter.nbytes
        for name, parameter in decoder.named_parameters()
        if ".experts." not in name and not name.startswith(("embedding", "positions"))
    )
    return weights + decoder.embedding.weight.nbytes
