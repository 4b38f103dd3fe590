"""Decode steps of a transformers model, each way to run them, and their time."""

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.decode.transformers_model import Bench, held
from exflow.bench.job import WARM_UP
from exflow.job.cluster import Cluster, all_gather_object

STEPS = 24


class Decode:
    """Steps of `batch` sequences, one after another at the same position: the greedy choice is fed back."""

    def __init__(self, bench: Bench, model: Any, batch: int) -> None:
        config, device = model.config, bench.cluster.device
        self.forward, self.context, self.vocabulary = model, bench.context, config.vocab_size
        self.cache: Any = StaticCache(config=config, max_cache_len=bench.context + 1)
        size = (batch, config.num_key_value_heads, config.head_dim)
        self.cache.early_initialization(*size, dtype=bench.dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        for layer in self.cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
        self.token = torch.empty(batch, 1, dtype=torch.int64, device=device)
        named = "cache" in inspect.signature(model.forward).parameters  # its newer name
        self.cache_name = "cache" if named else "past_key_values"

    def begin(self) -> None:
        self.token.copy_(torch.arange(len(self.token), device=self.token.device)[:, None] % self.vocabulary)

    def rewind(self) -> None:
        """Put the position where it was before a step."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def step(self) -> Tensor:
        """Logits [batch, vocabulary]."""
        logits: Tensor = self.forward(
            input_ids=self.token, use_cache=True, **{self.cache_name: self.cache}
        ).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits


def prepared(decode: Decode, how: str) -> Callable[[], Tensor]:
    """The step in the given way, after what it needs to be fast."""
    if how == "compiled":
        torch._dynamo.utils.counters.clear()
        decode.forward = torch.compile(decode.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for _ in range(WARM_UP):
        decode.rewind()
        decode.step()
    return captured(decode) if how == "captured" else decode.step


def captured(decode: Decode) -> Callable[[], Tensor]:
    """The eager step as one CUDA graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    decode.rewind()
    with torch.cuda.graph(graph):
        logits = decode.step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def median_us(cluster: Cluster, step: Callable[[], Tensor], rewind: Callable[[], None]) -> float:
    """Microseconds of a step of the slowest rank, after a warm-up. Collective."""
    on_gpu = cluster.device.type == "cuda"
    marks: list[tuple[Any, Any]] = []
    for _ in range(WARM_UP + STEPS):
        rewind()
        start, end = (torch.cuda.Event(enable_timing=True) if on_gpu else Clock() for _ in range(2))
        start.record()
        step()
        end.record()
        marks.append((start, end))
    if on_gpu:
        torch.cuda.synchronize()
    taken = [1000 * start.elapsed_time(end) for start, end in marks[WARM_UP:]]
    return float(statistics.median(map(max, zip(*all_gather_object(cluster, taken), strict=True))))


class Clock:
    """A torch.cuda.Event for the CPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Clock") -> float:
        return 1000 * (end.at - self.at)


@torch.no_grad()
def transformers_step(bench: Bench, model: Any, how: str, batch: int) -> dict[str, Any]:
    """Time and first logits of one way to run a step. Collective."""
    decode = Decode(bench, model, batch)
    decode.begin()
    step = prepared(decode, how)
    figures: dict[str, Any] = {"us": median_us(bench.cluster, step, decode.rewind)}
    decode.begin()
    decode.rewind()
    figures["logits"] = step()[0, :8].tolist()
    figures["experts_here"] = len(held(model.model.layers[0].mlp.experts.down_proj))
    if how == "compiled":  # graphs that inductor did not capture after all
        figures["cudagraph_skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return figures
