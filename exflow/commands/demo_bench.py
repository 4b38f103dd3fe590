"""Strategies and placements side by side in one job: their traffic, speed and tokens."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from exflow.job.cluster import Cluster
from exflow.model.checkpoint import Checkpoint
from exflow.model.config import ModelConfig
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.profiling.trace import DECODE, RoutingTrace
from exflow.runtime.deploy import Deployment, deploy
from exflow.runtime.request import Generation, Request
from exflow.runtime.trace_recorder import JobRecorder


@dataclass(frozen=True)
class Variant:
    """One way to run the same request; `placement` is the plan's name in the table."""

    strategy: Strategy
    placement: str
    plan: Plan


class CountersDisagree(RuntimeError):
    """Traffic counted in a run differs from the prediction of placement.traffic: a bug, not to be hidden."""


def measure(
    checkpoint: Checkpoint, variants: list[Variant], request: Request, cluster: Cluster, dtype: torch.dtype
) -> tuple[list[dict[str, Any]], list[Generation]]:
    """Run `request` under each variant, after a warm-up of two tokens. Returns figures (rank 0) and results.

    Raises CountersDisagree if the traffic of a run differs from the prediction for its routing.
    """
    figures, generations = [], []
    for variant in variants:
        engine = deploy(Deployment(checkpoint, variant.strategy, variant.plan, dtype), cluster)
        engine.generate(replace(request, max_new_tokens=2))
        recorder = JobRecorder(engine)
        generation, trace = engine.generate(request), recorder.trace()
        if cluster.rank == 0:
            figures.append(describe(variant, engine.decoder.config, generation, trace, dtype.itemsize))
        generations.append(generation)
    return figures, generations


def describe(
    variant: Variant, config: ModelConfig, generation: Generation, trace: RoutingTrace, itemsize: int
) -> dict[str, Any]:
    """The figures of one run's decode steps; traffic as the ranks counted it, per token and MoE layer."""
    from exflow.placement.traffic.evaluate import evaluate  # compiled code, which only rank 0 needs

    counted, steps = generation.decode, generation.steps
    decoded = trace.select(trace.phase == DECODE)
    predicted = evaluate(variant.plan, decoded)
    _check_counters(variant, generation, predicted["strategies"][variant.strategy.key])
    token_layers = decoded.num_tokens * decoded.num_layers
    reduced_rows = 2 * (variant.plan.num_ranks - 1) if counted.all_reduces else 0  # of a ring, on all ranks
    return {
        "strategy": variant.strategy,
        "placement": variant.placement,
        "ranks": variant.plan.num_ranks,
        "messages_per_token_layer": counted.messages / token_layers,
        "critical_bytes_per_token_layer": counted.hidden_bytes / token_layers
        + reduced_rows * config.hidden_size * itemsize,
        "background_bytes_per_token_layer": counted.kv_bytes / token_layers,
        "wire_bytes_per_token_layer": counted.wire_bytes / token_layers,
        "local_fraction": predicted["local_fraction"],
        "imbalance": predicted["imbalance"]["mean"],
        "imbalance_max": predicted["imbalance"]["max"],
        "all_to_alls_per_step": counted.all_to_alls / steps,
        "gathers_per_step": counted.gathers / steps,
        "all_reduces_per_step": counted.all_reduces / steps,
        "tokens_per_s": generation.tokens_per_s,
        "ttft_s": generation.prefill_s,
        "tpot_ms": 1000 * generation.decode_s / steps,
    }


def _check_counters(variant: Variant, generation: Generation, predicted: dict[str, Any]) -> None:
    for name, value in predicted["totals"].items():
        counted = getattr(generation.decode, name)
        if counted != value:
            raise CountersDisagree(
                f"{variant.strategy} with {variant.placement} placement: the ranks counted {counted} {name}, "
                f"the run's routing predicts {value}"
            )
