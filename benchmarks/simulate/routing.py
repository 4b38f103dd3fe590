"""The models of the scenarios, each with routing to place by and routing to judge by."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode.cases import SHAPES, SOURCES, grid_config
from benchmarks.decode.cases import routing as routing_of
from benchmarks.hosts.shapes import split
from benchmarks.routing.generated import generate
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.profiling.trace import RoutingTrace


def routing(model: str, traces: Path) -> tuple[ModelConfig, RoutingTrace, RoutingTrace]:
    """The model, routing to place by, and routing to judge by."""
    if model.startswith("hosts-"):
        parts = split(model.removeprefix("hosts-"), traces, 32)
        test = parts.windows.reshape(-1, *parts.windows.shape[2:])
        return parts.config, parts.train, _trace(test, parts.config)
    if model == "deepseek-v3-like":
        return _deepseek()
    source = SOURCES[model]
    experts = int(model.rpartition("-")[2]) if source.shape is None else 0
    config = load_model_config(SHAPES / source.shape) if source.shape else grid_config(model, experts)
    return config, *routing_of(source, config, traces)


def _trace(experts: np.ndarray[Any, np.dtype[Any]], config: ModelConfig) -> RoutingTrace:
    return RoutingTrace.from_arrays(
        experts,
        num_experts=config.num_experts,
        sequence=np.arange(len(experts)) // 32,
        model=config.name,
        moe_layer_ids=config.moe_layer_ids,
        num_hidden_layers=config.num_hidden_layers,
    )


def _deepseek() -> tuple[ModelConfig, RoutingTrace, RoutingTrace]:
    """DeepSeek-V3's sizes in this package's terms, on generated routing: nothing of it was recorded.

    Its latent of 576 numbers is one K/V head of 288. The number of query heads gives attention and shared
    expert their original weight (231 million numbers a layer). Products of its attention are not modelled.
    """
    config = ModelConfig(
        name="deepseek-v3-like",
        vocab_size=129280,
        max_positions=8192,
        num_hidden_layers=61,
        hidden_size=7168,
        num_attention_heads=56,
        num_kv_heads=1,
        head_dim=288,
        intermediate_size=2048,
        dense_layers=(0, 1, 2),
        dense_intermediate_size=18432,
        activation="swiglu",
        num_experts=256,
        top_k=8,
    )
    trace = generate(
        tokens=24_000,
        layers=len(config.moe_layer_ids),
        experts=256,
        top_k=8,
        skew=0.3,
        affinity=0.7,
        sequences=1000,
        seed=0,
    )
    held_out = trace.sequence % 2 == 1
    return config, _trace(trace.experts[~held_out], config), _trace(trace.experts[held_out], config)
