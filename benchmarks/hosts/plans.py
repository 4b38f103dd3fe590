"""Placements that are compared on several hosts: by messages, and by time on the emulated network."""

import math
import re
from dataclasses import replace

from benchmarks.hosts.rates import ExpertRates
from exflow.cost.auto import step_traffic
from exflow.model.config import ModelConfig
from exflow.placement.fastest_plan import place_for_time
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.time.machine import Link, Machine
from exflow.placement.time.machines import NamedMachine, machine_named
from exflow.placement.time.serving import Serving
from exflow.placement.time.sizes import ModelSizes
from exflow.profiling.trace import RoutingTrace

# how each is made, and for how many slots there is a spare one, which holds a replica
PLACEMENTS = {"contiguous": ("contiguous", 0), "affinity": ("auto", 0), "replicas": ("auto", 8)}
TIME_PLACEMENTS = {"time": 0, "time-replicas": 8}
PLACE_SECONDS = 20.0
MEASURED, MEASURED_BITS_PER_S = "hosts-1gbit", 1e9  # the machine, and the rate of its cables
RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}  # units of tc
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def plans_of(trace: RoutingTrace, count: int) -> dict[str, Plan]:
    """Plans by name of the placement. All ranks wait for the rank that serves most and for the one that owns
    most, so a unit of imbalance is priced as all messages."""
    topology = Topology(num_nodes=count, gpus_per_node=1)
    baseline = step_traffic(place(trace, topology, solving=Solving("contiguous")), trace, count)
    messages = sum(baseline.dispatch + baseline.combine)
    objective = Objective(balance_price=messages, owner_price=messages)
    return {
        name: place(
            trace,
            topology,
            objective=objective,
            solving=Solving(method, time_limit=PLACE_SECONDS),
            redundant_experts=redundant_of(trace, each),
        )
        for name, (method, each) in PLACEMENTS.items()
    }


def time_plans_of(trace: RoutingTrace, count: int, serving: Serving) -> dict[str, Plan]:
    """Plans of least time for dispatch-combine, by name of the placement."""
    topology = Topology(num_nodes=count, gpus_per_node=1)
    return {
        name: place_for_time(
            trace,
            topology,
            serving,
            time_limit=PLACE_SECONDS,
            redundant_experts=redundant_of(trace, each),
        )
        for name, each in TIME_PLACEMENTS.items()
    }


def redundant_of(trace: RoutingTrace, each: int) -> int:
    """The spare slots, one for `each` slots; none for 0."""
    return trace.num_experts // each if each else 0


def serving_of(config: ModelConfig, machine: NamedMachine, batch: int) -> Serving:
    """Our own runtime with `batch` tokens a host."""
    return Serving("exflow", Strategy.DISPATCH_COMBINE, machine, sizes_of(config), batch)


def network_machine(rate: str, delay: str | None, config: ModelConfig, rates: ExpertRates) -> NamedMachine:
    """Hosts on cables of this rate and one-way delay, as tc spells them, with cores of these rates.

    A cable carries the share of its rate, and an exchange waits as long, as was measured at 1 Gbit/s
    (configs/machines/hosts-1gbit.yaml); the delay is added once.
    """
    known, sizes = machine_named(MEASURED).machine, sizes_of(config)
    link = Link(
        known.between.latency_s + (tc_number(delay, TIMES) if delay else 0.0),
        known.between.bytes_per_s * tc_number(rate, RATES) / MEASURED_BITS_PER_S,
    )
    machine = replace(
        known,
        inside=link,
        between=link,
        read_bytes_per_s=sizes.expert_bytes / rates.expert_s if rates.expert_s else math.inf,
        flops_per_s=sizes.operations / rates.row_s if rates.row_s else math.inf,
    )
    return NamedMachine(f"hosts on cables of {rate}", machine)


def sizes_of(config: ModelConfig) -> ModelSizes:
    """The sizes of a model in float32: hidden states count twice, as ModelSizes has two bytes a number."""
    return ModelSizes(config.name, 2 * config.hidden_size, config.expert_weights, 2 * config.kv_width)


def tc_number(text: str, units: dict[str, float]) -> float:
    """A rate or time as tc spells it, like 200mbit or 0.1ms, in the first of the units.

    Raises ValueError for any other unit.
    """
    found = re.fullmatch(r"([0-9.]+)([a-z]+)", text)
    if found is None or found[2] not in units:
        raise ValueError(f"{text!r}: write a number and one of {', '.join(units)}")
    return float(found[1]) * units[found[2]]


def placed_for(machine: Machine, rates: ExpertRates) -> dict[str, float]:
    """The figures that the time plans were made for."""
    return {
        "exchange_latency_ms": 1000 * machine.between.latency_s,
        "megabytes_per_s_of_a_rank": machine.between.bytes_per_s / 1e6,
        "expert_us": 1e6 * rates.expert_s,
        "row_us": 1e6 * rates.row_s,
    }
