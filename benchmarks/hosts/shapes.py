"""Models that the hosts run, and the recorded routing that they replay."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.routing.recorded import joined, read
from exflow.model.config import ModelConfig
from exflow.profiling.trace import RoutingTrace


@dataclass(frozen=True)
class Shape:
    """A model's routing (`domains`, empty for all; the first `choices` of each token, None for all), and
    widths.

    In the original K/V width over hidden width is 1024 / 2880 (gpt-oss) and 576 / 2048 (DeepSeek, whose
    context is a latent); `top1` is one narrow head.
    """

    model: str
    domains: tuple[str, ...]
    choices: int | None
    hidden: int
    head_dim: int


SHAPES = {
    "top1": Shape("gpt-oss-20b", ("MMLU",), 1, 2048, 32),
    "gpt-oss": Shape("gpt-oss-20b", ("MMLU",), None, 1440, 256),
    "deepseek": Shape("DeepSeek-V2-Lite", (), None, 1024, 144),
}


@dataclass(frozen=True)
class Split:
    """Model and routing of a shape: `train` to place by, `windows` of equal length to replay."""

    config: ModelConfig
    train: RoutingTrace
    windows: np.ndarray[Any, np.dtype[Any]]  # [windows, length, layers, choices]


def split(name: str, folder: Path, length: int) -> Split:
    """Split the recorded routing of a shape. Raises NoTrace if the folder lacks it."""
    shape = SHAPES[name]
    found = joined(read(folder, shape.model, shape.domains).values())
    experts, sequence = found.trace.experts[:, :, : shape.choices], found.trace.sequence
    config = ModelConfig(
        name=name,
        vocab_size=512,
        max_positions=length + 1,
        num_hidden_layers=experts.shape[1],
        hidden_size=shape.hidden,
        num_attention_heads=1,
        num_kv_heads=1,
        head_dim=shape.head_dim,
        intermediate_size=16,
        num_experts=found.trace.num_experts,
        top_k=experts.shape[2],
    )
    held_out = found.held_out
    train = RoutingTrace.from_arrays(
        experts[~held_out], num_experts=config.num_experts, sequence=sequence[~held_out], model=name
    )
    windows = [
        experts[rows[at : at + length]]
        for rows in (np.flatnonzero(sequence == each) for each in np.unique(sequence[held_out]))
        for at in range(0, len(rows) - length + 1, length)
    ]
    return Split(config, train, np.random.default_rng(0).permutation(np.stack(windows)))


def replayed(parts: Split, batch: int) -> RoutingTrace:
    """The routing of a batch: a window for each sequence, from the beginning again if there are too few."""
    chosen = parts.windows[np.arange(batch) % len(parts.windows)]
    sequences, length = chosen.shape[:2]
    return RoutingTrace.from_arrays(
        chosen.reshape(-1, *chosen.shape[2:]),
        num_experts=parts.config.num_experts,
        sequence=np.arange(sequences).repeat(length),
        model=parts.config.name,
    )
