"""Measured runs of a job beside the cost model's predictions, and what the model's choice gains."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.hosts.job import Job
from exflow.cost.auto import step_traffic
from exflow.cost.predict import predict
from exflow.cost.workload import StepTraffic, Workload
from exflow.model.config import ModelConfig
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.machine import Link, Machine
from exflow.profiling.trace import RoutingTrace


def judge(job: Job, folder: Path, config: ModelConfig, trace: RoutingTrace) -> dict[str, Any]:
    """Measured figures and the model's predictions, variant by variant."""
    stored = json.loads((folder / "machine.json").read_text())
    inside, between = (Link(**stored.pop(name)) for name in ("inside", "between"))
    machine = Machine(inside, between, **stored)
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    decoded = trace.select(trace.position > 0)  # the first token of each is its prompt
    variants = []
    for placement in job.placements:
        plan = Plan.load(folder / f"{placement}.json")
        load = Workload.of(config, plan, job.batch, job.steps // 2, 4)
        for strategy in job.strategies:
            mine = [run for run in runs if (run["strategy"], run["placement"]) == (strategy, placement)]
            if mine:
                moved = moved_of(strategy, plan, decoded)
                variants.append(
                    describe(strategy, placement, mine, job) | predicted(strategy, load, moved, machine, job)
                )
                check_counters(variants[-1], mine[0]["counters"], moved, decoded)
    return {"machine": machine_figures(machine), "variants": variants}


def moved_of(strategy: str, plan: Plan, decoded: RoutingTrace) -> StepTraffic:
    if strategy != "replicated":
        return step_traffic(plan, decoded, int(strategy))
    return StepTraffic(1, 0, (0, 0), (0, 0), (0, 0), 1, 1, all_reduces=plan.num_layers)


def describe(strategy: str, placement: str, runs: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    counters, seconds = runs[0]["counters"], [run["step_s"] for run in runs]
    return {
        "strategy": strategy,
        "placement": placement,
        "tokens_per_s": job.batch / statistics.median(seconds),
        "step_ms": 1000 * statistics.median(seconds),
        "step_ms_of_runs": [1000 * each for each in seconds],
        "per_step": {name: value / job.steps for name, value in counters.items()},
    }


def predicted(
    strategy: str, load: Workload, moved: StepTraffic, machine: Machine, job: Job
) -> dict[str, Any]:
    named = Strategy.REPLICATED if strategy == "replicated" else Strategy.COHERENT
    prediction = predict(named, load, moved, machine)
    return {
        "predicted_ms": 1000 * prediction.step_s,
        "predicted_parts_ms": {
            "exchanges": 1000 * prediction.exchange_s,
            "compute": 1000 * prediction.compute_s,
            "background": 1000 * prediction.background_s,
        },
        "busiest": moved.expert_imbalance,
        "attending": moved.attention_imbalance,
    }


def check_counters(
    variant: dict[str, Any], counters: dict[str, Any], moved: StepTraffic, decoded: RoutingTrace
) -> None:
    """Raise RuntimeError unless the ranks have sent exactly the messages that placement counts."""
    messages = round(sum(moved.dispatch + moved.combine) * decoded.num_tokens * decoded.num_layers)
    counted = sum(counters[name] for name in counters if name.startswith(("dispatch_", "return_")))
    if counted != messages:
        raise RuntimeError(
            f"{variant['strategy']}: the ranks sent {counted} messages, {messages} are predicted"
        )


def machine_figures(machine: Machine) -> dict[str, float | bool]:
    return {
        "exchange_latency_ms": 1000 * machine.between.latency_s,
        "megabytes_per_s_of_a_rank": machine.between.bytes_per_s / 1e6,
        "layer_ms": 1000 * machine.layer_s,
        "token_us": 1e6 * machine.token_s,
        "shared": machine.shared,
    }


def gains(variants: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each placement, the model's pick over dispatch-combine with contiguous placement."""
    placed: dict[str, list[dict[str, Any]]] = {}
    for each in variants:
        placed.setdefault(each["placement"], []).append(each)
    baseline = next((each for each in placed.get("contiguous", []) if each["strategy"] == "1"), None)
    return {} if baseline is None else {name: gain(baseline, mine) for name, mine in placed.items()}


def gain(baseline: dict[str, Any], variants: list[dict[str, Any]]) -> dict[str, Any]:
    picked, best = (min(variants, key=lambda each: each[of]) for of in ("predicted_ms", "step_ms"))
    return {
        "picked": picked["strategy"],
        "gain": baseline["step_ms"] / picked["step_ms"],
        "predicted_gain": baseline["predicted_ms"] / picked["predicted_ms"],
        "fastest": best["strategy"],
        "gain_of_fastest": baseline["step_ms"] / best["step_ms"],
    }
