import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.confidence import held_out_figures, interval, split_by_sequence
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.merge import of_sequences
from exflow.profiling.trace import RoutingTrace

EXPERTS, LAYERS = 4, 3
FOUR = Topology(gpus_per_node=4)
TWO_BY_TWO = Topology(num_nodes=2, gpus_per_node=2)


def trace_of(choices: np.ndarray, ids: np.ndarray | None = None) -> RoutingTrace:
    """Make a trace from [sequences, tokens, LAYERS] experts of a top-1 router."""
    sequences, tokens, layers = choices.shape
    ids = np.arange(sequences) if ids is None else ids
    return RoutingTrace.from_arrays(
        choices.reshape(sequences * tokens, layers), num_experts=EXPERTS, sequence=np.repeat(ids, tokens)
    )


def random_trace(sequences: int, tokens: int = 5, seed: int = 0) -> RoutingTrace:
    return trace_of(np.random.default_rng(seed).integers(0, EXPERTS, (sequences, tokens, LAYERS)))


def plan_for(trace: RoutingTrace, topology: Topology = FOUR, seed: int | None = 0, **known: Any) -> Plan:
    """The experts in an order drawn by the seed, or contiguous."""
    order = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    slots = order if seed is None else np.random.default_rng(seed).permuted(order, axis=1)
    return Plan.of_slots(slots, topology, trace, method="test", **known)


@given(
    ids=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    share=st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.1, 0.2, 0.25, 1 / 3, 0.5, 0.7, 0.9])),
)
def test_a_split_is_a_partition_into_whole_sequences(ids: list[int], share: float) -> None:
    tokens = np.arange(len(ids))  # a token is known by its experts
    digits = np.stack([tokens // EXPERTS**layer % EXPERTS for layer in range(LAYERS)], axis=1)
    trace = RoutingTrace.from_arrays(digits, num_experts=EXPERTS, sequence=ids)
    distinct = sorted(set(ids))
    try:
        parts = split_by_sequence(trace, share)
    except InputError as error:
        assert len(distinct) * share < 1.001, error
        return
    members = []
    for part in parts:
        rows = part.experts[:, :, 0] @ EXPERTS ** np.arange(LAYERS)
        assert sorted(rows) == rows.tolist()
        of = np.array(ids)[rows]
        assert np.array_equal(part.sequence, np.unique(of, return_inverse=True)[1])
        assert part.num_tokens == np.isin(ids, of).sum()
        members.append(set(of.tolist()))
    assert members[0] | members[1] == set(distinct)
    assert not members[0] & members[1]
    assert abs(len(members[1]) - share * len(distinct)) < 1.001


@pytest.mark.parametrize(
    ("share", "held_out"),
    [
        (0.25, [3, 7, 11, 15, 19]),
        (0.1, [9, 19]),
        (0.7, [1, 2, 4, 5, 7, 8, 9, 11, 12, 14, 15, 17, 18, 19]),
        (1 / 3, [2, 5, 8, 11, 14, 17]),
    ],
)
def test_the_held_out_sequences_are_spread_whatever_floats_round_to(
    share: float, held_out: list[int]
) -> None:
    """Sequence i has i + 1 tokens, and an id that is not i."""
    ids = np.repeat(np.arange(20) * 3 + 1, np.arange(20) + 1)
    trace = RoutingTrace.from_arrays(np.zeros((len(ids), 1), int), num_experts=1, sequence=ids)
    _, part = split_by_sequence(trace, share)
    assert np.bincount(part.sequence).tolist() == [i + 1 for i in held_out]


def test_both_parts_are_at_home_on_all_ranks() -> None:
    for part in split_by_sequence(random_trace(64), 0.25):
        homes = np.bincount(np.unique(part.sequence) % 4)
        assert len(set(homes.tolist())) == 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 25.0, 1e-9, 1 - 1e-9])
def test_a_share_of_none_or_all_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"held-out share is .*, of 8 sequences; choose a number between"):
        split_by_sequence(random_trace(8), share)


@pytest.mark.parametrize(("sequences", "share", "fewest"), [(3, 0.25, 4), (1, 0.5, 2), (5, 0.3, 4)])
def test_too_few_sequences_are_refused(sequences: int, share: float, fewest: int) -> None:
    trace = random_trace(sequences)
    if sequences >= fewest:
        assert all(part.num_tokens for part in split_by_sequence(trace, share))
        return
    with pytest.raises(InputError, match=rf"has {sequences} sequence\(s\).*record {fewest} at least"):
        split_by_sequence(trace, share)


def test_sequences_chosen_by_place_in_the_order_of_ids() -> None:
    trace = trace_of(np.arange(3)[:, None, None] * np.ones((3, 2, LAYERS), int), np.array([9, 5, 7]))
    chosen = of_sequences(trace, np.array([2, 0]))  # the ids 9 and 5
    assert chosen.sequence.tolist() == [1, 1, 0, 0]
    assert chosen.experts[:, 0, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("topology", [FOUR, TWO_BY_TWO])
@pytest.mark.parametrize("strategy", ["coherent", "node-coherent", "dispatch-combine"])
@pytest.mark.parametrize("sequences", [9, 300])
def test_the_values_are_those_of_evaluate(topology: Topology, strategy: Any, sequences: int) -> None:
    trace = random_trace(sequences)
    plan = plan_for(trace, topology, strategy=strategy)
    figures, expected = interval(plan, trace, draws=50), evaluate(plan, trace)
    whole = expected["strategies"][strategy.replace("-", "_")]
    assert figures["messages_per_token_layer"]["value"] == whole["messages_per_token_layer"]
    assert figures["imbalance"]["value"] == pytest.approx(expected["imbalance"]["mean"])
    assert ("inter_node" in figures) == (topology.num_nodes > 1)
    if "inter_node" in figures:
        assert figures["inter_node"]["value"] == whole["inter_node"]
    assert (figures["sequences"], figures["level"]) == (sequences, 0.95)
    assert json.loads(json.dumps(figures)) == figures


def bounds_in(figures: dict[str, Any]) -> list[dict[str, float]]:
    return [each for each in figures.values() if isinstance(each, dict)]


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.integers(1, 12),
    tokens=st.integers(1, 4),
    draws=st.integers(1, 30),
    level=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_an_interval_holds_its_value(
    sequences: int, tokens: int, draws: int, level: float, seed: int
) -> None:
    trace = random_trace(sequences, tokens, seed)
    plan = plan_for(trace, TWO_BY_TWO, seed)
    figures = held_out_figures(plan, trace, trace, draws=draws, level=level, seed=seed)
    assert len(bounds_in(figures)) == 5 - (figures["ratio_to_contiguous"] is None)
    for each in bounds_in(figures):
        assert each["low"] <= each["value"] <= each["high"]
        assert sequences > 1 or each["low"] == each["high"]
    assert figures["imbalance"]["low"] >= 1


def test_equal_sequences_leave_no_doubt() -> None:
    """Each is at home on rank 0, and every token goes round the ranks."""
    choices = np.tile(np.random.default_rng(0).integers(0, EXPERTS, (1, 6, LAYERS)), (20, 1, 1))
    trace = trace_of(choices, np.arange(20) * 4)
    for each in bounds_in(interval(plan_for(trace), trace)):
        assert each["low"] == pytest.approx(each["high"])


def test_the_same_seed_draws_the_same() -> None:
    trace = random_trace(30)
    plan = plan_for(trace)
    assert interval(plan, trace, seed=1) == interval(plan, trace, seed=1)
    assert interval(plan, trace, seed=1) != interval(plan, trace, seed=2)


def test_more_sequences_narrow_an_interval_and_more_draws_do_not() -> None:
    def width(sequences: int, draws: int) -> float:
        trace = random_trace(sequences)
        messages = interval(plan_for(trace), trace, draws=draws)["messages_per_token_layer"]
        return float(messages["high"] - messages["low"])

    assert width(40, 4000) == pytest.approx(width(40, 500), rel=0.25)
    assert width(640, 1000) == pytest.approx(width(40, 1000) / 4, rel=0.35)


def test_a_higher_level_is_wider() -> None:
    trace = random_trace(30)
    plan = plan_for(trace)
    narrow, wide = (interval(plan, trace, level=level) for level in (0.5, 0.99))
    for inner, outer in zip(bounds_in(narrow), bounds_in(wide), strict=True):
        assert outer["low"] <= inner["low"] <= inner["high"] <= outer["high"]


def test_the_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """A sequence keeps to one rank more or less, so drawing tokens would be far too sure."""
    rng = np.random.default_rng(0)
    population, tokens, drawn, times = 3000, 20, 40, 200
    stay = rng.random((population, tokens, LAYERS)) < rng.beta(0.5, 0.5, (population, 1, 1))
    favourite = rng.choice(EXPERTS, (population, 1, 1), p=[0.4, 0.3, 0.2, 0.1])
    choices = np.where(stay, favourite, rng.integers(0, EXPERTS, (population, tokens, LAYERS)))
    everything = trace_of(choices)
    plan = plan_for(everything, seed=None)
    truth = interval(plan, everything, draws=1)
    covered = {"messages_per_token_layer": 0, "imbalance": 0}
    for seed in range(times):
        sample = trace_of(choices[rng.integers(0, population, drawn)])
        figures = interval(plan, sample, draws=200, seed=seed)
        for name in covered:
            covered[name] += figures[name]["low"] <= truth[name]["value"] <= figures[name]["high"]
    assert 0.88 < covered["messages_per_token_layer"] / times < 0.99
    assert covered["imbalance"] / times > 0.88


def test_level_loads_are_not_taken_for_uneven_ones() -> None:
    """All imbalance is chance, and a resample has more of it: plain percentiles would always miss 1."""
    times = 60
    intervals = []
    for seed in range(times):
        trace = random_trace(128, seed=seed)
        intervals.append(interval(plan_for(trace), trace, draws=200)["imbalance"])
    assert all(each["value"] > 1 for each in intervals)
    assert np.mean([each["low"] < 1.02 for each in intervals]) > 0.8


@given(seed=st.integers(0, 99), sequences=st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_the_contiguous_plan_is_as_good_as_itself(seed: int, sequences: int) -> None:
    train, held_out = random_trace(5, seed=seed + 100), random_trace(sequences, seed=seed)
    figures = held_out_figures(plan_for(train, seed=None), held_out, train, draws=40)
    assert figures["contiguous"] == figures["messages_per_token_layer"]
    assert figures["ratio_to_contiguous"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_held_out_figures() -> None:
    train, held_out = random_trace(30, seed=1), random_trace(10, seed=2)
    plan = plan_for(train, TWO_BY_TWO)
    figures = held_out_figures(plan, held_out, train)
    assert {"tokens": 50, "level": 0.95, **interval(plan, held_out)}.items() <= figures.items()
    contiguous = interval(plan_for(train, TWO_BY_TWO, seed=None), held_out)["messages_per_token_layer"]
    assert figures["contiguous"] == contiguous
    ratio = figures["ratio_to_contiguous"]
    assert ratio["value"] == pytest.approx(
        figures["messages_per_token_layer"]["value"] / contiguous["value"], rel=1e-12
    )
    json.dumps(figures)


def test_pairing_narrows_the_ratio() -> None:
    """Sequences differ much in how far they wander, under any plan: that cancels out."""
    rng = np.random.default_rng(0)
    stay = rng.random((60, 30, LAYERS)) < rng.random((60, 1, 1))
    trace = trace_of(np.where(stay, 0, rng.integers(0, EXPERTS, (60, 30, LAYERS))))
    plan = Plan.of_slots(
        np.array([[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 2, 1]]), FOUR, trace, method="test"
    )  # expert 0 on rank 0, as in the contiguous one
    figures = held_out_figures(plan, trace, trace)

    def relative(each: dict[str, float]) -> float:
        return (each["high"] - each["low"]) / each["value"]

    assert relative(figures["ratio_to_contiguous"]) < relative(figures["contiguous"]) / 2


def test_replicas_and_layers_of_unequal_size() -> None:
    choices = np.random.default_rng(0).integers(0, [[[4, 3, 2]]], (8, 5, LAYERS))
    trace = RoutingTrace.from_arrays(
        choices.reshape(40, LAYERS),
        num_experts=EXPERTS,
        sequence=np.repeat(np.arange(8), 5),
        experts_per_layer=[4, 3, 2],
    )
    slots = np.stack([np.arange(8) % experts for experts in (4, 3, 2)])
    plan = Plan.of_slots(slots, FOUR, trace, method="contiguous")
    assert held_out_figures(plan, trace, trace)["ratio_to_contiguous"] == {"value": 1, "low": 1, "high": 1}


def test_one_gpu_sends_nothing_and_has_nothing_to_compare() -> None:
    trace = random_trace(8)
    figures = held_out_figures(plan_for(trace, Topology(gpus_per_node=1)), trace, trace)
    assert figures["messages_per_token_layer"] == {"value": 0, "low": 0, "high": 0}
    assert figures["imbalance"] == {"value": 1, "low": 1, "high": 1}
    assert figures["ratio_to_contiguous"] is None


def test_no_draw_may_have_anything_to_compare() -> None:
    """Contiguous sends one message in all, which few draws have."""
    choices = np.zeros((20, 1, LAYERS), int)
    choices[0, 0] = [0, 1, 1]
    trace = trace_of(choices, np.arange(20) * 4)
    plan = plan_for(trace, seed=None)
    for seed in range(5):
        figures = held_out_figures(plan, trace, trace, draws=1, seed=seed)
        assert figures["ratio_to_contiguous"] == {"value": 1, "low": 1, "high": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws is 0; choose 1 or more"),
        ({"level": 1.0}, r"level is 1\.0; choose a number between 0 and 1"),
        ({"level": 95}, "level is 95; choose"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    trace = random_trace(4)
    with pytest.raises(InputError, match=message):
        interval(plan_for(trace), trace, **settings)


def test_traces_that_do_not_fit_are_refused() -> None:
    trace = random_trace(4)
    plan = plan_for(trace)
    with pytest.raises(InputError, match="the trace has no tokens"):
        interval(plan, trace.select([False] * trace.num_tokens))
    other = RoutingTrace.from_arrays([[0, 1]], num_experts=EXPERTS)
    with pytest.raises(InputError, match="MoE layers"):
        interval(plan, other)
