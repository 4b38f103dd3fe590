"""Plans for emulated hosts by time: the machine that they are made for, and the gains over the baseline."""

import math
from typing import Any

import pytest

from benchmarks.hosts import plans
from benchmarks.hosts.judge import gains
from benchmarks.hosts.rates import NO_DIFFERENCE, ExpertRates, expert_rates
from exflow.model.config import ModelConfig
from exflow.placement.plan.strategy import Strategy
from tests.placement.planted import planted

CONFIG = ModelConfig(
    name="narrow",
    vocab_size=16,
    max_positions=8,
    num_hidden_layers=3,
    hidden_size=64,
    num_attention_heads=1,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=16,
    num_experts=16,
    top_k=2,
)


def test_rates_and_times_as_tc_spells_them() -> None:
    assert plans.tc_number("200mbit", plans.RATES) == 200e6
    assert plans.tc_number("1gbit", plans.RATES) == 1e9
    assert plans.tc_number("0.5ms", plans.TIMES) == 0.5e-3
    for text, units in (("200mbit", plans.TIMES), ("1gbps", plans.RATES), ("fast", plans.RATES)):
        with pytest.raises(ValueError, match=f"'{text}': write a number and one of"):
            plans.tc_number(text, units)


def test_cables_carry_the_measured_share_of_their_rate() -> None:
    link = plans.network_machine("200mbit", "2ms", CONFIG, NO_DIFFERENCE).machine.between
    assert link.bytes_per_s == pytest.approx(0.2 * 87e6)  # of 1 Gbit/s: 87 MB/s
    assert link.latency_s == pytest.approx(2.5e-3)


def test_experts_take_the_measured_seconds() -> None:
    sizes = plans.sizes_of(CONFIG)
    assert sizes.row_bytes == 4 * CONFIG.hidden_size
    machine = plans.network_machine("1gbit", None, CONFIG, ExpertRates(13e-6, 18e-6)).machine
    assert sizes.expert_bytes / machine.read_bytes_per_s == pytest.approx(13e-6)
    assert sizes.operations / machine.flops_per_s == pytest.approx(18e-6)
    shared = plans.network_machine("1gbit", None, CONFIG, NO_DIFFERENCE).machine
    assert shared.read_bytes_per_s == shared.flops_per_s == math.inf


def test_experts_are_measured() -> None:
    rates = expert_rates(CONFIG, threads=1, slots=8)
    assert 0 <= rates.expert_s < 1
    assert 0 <= rates.row_s < 1


def test_plans_by_time_are_for_dispatch_combine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PLACE_SECONDS", 1.0)
    machine = plans.network_machine("1gbit", None, CONFIG, NO_DIFFERENCE)
    made = plans.time_plans_of(planted()[0], 2, plans.serving_of(CONFIG, machine, batch=8))
    assert {name: plan.num_slots for name, plan in made.items()} == {"time": 16, "time-replicas": 18}
    assert {plan.strategy for plan in made.values()} == {Strategy.DISPATCH_COMBINE}
    assert {plan.num_ranks for plan in made.values()} == {2}


def variant(placement: str, strategy: str, step_ms: float, predicted_ms: float) -> dict[str, Any]:
    return {
        "placement": placement,
        "strategy": strategy,
        "step_ms": step_ms,
        "predicted_ms": predicted_ms,
    }


def test_gains_are_over_contiguous_dispatch_combine() -> None:
    measured = [
        variant("contiguous", "1", 10, 12),
        variant("contiguous", "2", 8, 6),
        variant("time", "1", 5, 4),
    ]
    found = gains(measured)
    assert (found["contiguous"]["picked"], found["contiguous"]["gain"]) == ("2", 1.25)
    assert (found["time"]["fastest"], found["time"]["gain"], found["time"]["predicted_gain"]) == ("1", 2, 3)
    assert gains(measured[1:]) == {}
