from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from exflow.errors import InputError
from exflow.placement.affinity import count_affinity
from exflow.placement.baselines import contiguous, random
from exflow.placement.plan import Plan
from exflow.placement.problem import PlacementProblem, problem_from_counts
from exflow.placement.sweep import sweep
from exflow.placement.topology import Topology
from exflow.placement.traffic import count_traffic
from exflow.profiling.trace import RoutingTrace

# Two layers, four experts, two parts: a price of 5 from expert 0 to expert 3, and of 2 between 0 and 1.
TWO_LAYERS = PlacementProblem(
    inter=np.array([[[0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]], dtype=np.float64),
    intra=np.stack([2 * np.eye(4)[[1, 0, 2, 3]] * (np.arange(4) < 2), np.zeros((4, 4))]),
    load=np.ones((2, 4)),
    num_parts=2,
)


@pytest.mark.parametrize(
    ("assignment", "cost"),
    [
        ([[0, 0, 1, 1], [1, 1, 0, 0]], 0),
        ([[0, 0, 1, 1], [0, 0, 1, 1]], 5),
        ([[0, 1, 0, 1], [1, 1, 0, 0]], 2),
        ([[0, 1, 0, 1], [0, 0, 1, 1]], 7),
    ],
)
def test_cost_is_the_prices_of_what_is_apart(assignment: list[list[int]], cost: float) -> None:
    assert TWO_LAYERS.cost(np.array(assignment)) == cost


def test_balanced_means_equal_shares_in_every_layer() -> None:
    assert TWO_LAYERS.is_balanced(np.array([[0, 1, 1, 0], [1, 1, 0, 0]]))
    assert not TWO_LAYERS.is_balanced(np.array([[0, 1, 1, 1], [1, 0, 0, 0]]))  # only over both layers
    assert not TWO_LAYERS.is_balanced(np.array([[0, 1, 1, 0]]))
    assert not TWO_LAYERS.is_balanced(np.array([[0, 0, 2, 2], [0, 0, 1, 1]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_parts": 3}, r"4 experts cannot be spread evenly over 3 parts; choose a divisor of 4"),
        ({"num_parts": 0}, r"4 experts cannot be spread evenly over 0 parts"),
        ({"inter": np.zeros((2, 4, 4))}, r"inter: shape \(2, 4, 4\), expected \(1, 4, 4\)"),
        ({"inter": np.zeros((1, 4, 4), dtype=np.int64)}, r"inter: dtype int64, expected float64"),
        ({"inter": np.full((1, 4, 4), np.nan)}, r"inter: .*non-finite"),
        ({"inter": np.full((1, 4, 4), -1.0)}, r"inter: .*negative"),
        ({"intra": np.ones((2, 4, 4))}, r"intra: the diagonal is not zero"),
        ({"intra": np.triu(np.ones((2, 4, 4)), 1)}, r"intra: not symmetric"),
        ({"load": np.ones(4)}, r"load: shape \(4,\); give \[layers, experts\]"),
        ({"load": np.ones((0, 4))}, r"load: shape \(0, 4\)"),
    ],
)
def test_bad_arrays_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        replace(TWO_LAYERS, **change)
    assert "\n" not in str(error.value)


@given(seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_cost_splits_into_between_and_inside_nodes(
    random_problem: Callable[..., PlacementProblem], seed: int
) -> None:
    problem = random_problem((3, 8, 4), seed)
    ranks = random(3, 8, 4, seed)
    nodes = ranks // 2
    inside = 0.0
    for node in range(2):
        experts = np.stack([np.flatnonzero(row == node) for row in nodes])
        inside += problem.restricted(experts, 2).cost(np.take_along_axis(ranks, experts, axis=1) % 2)
    assert problem.cost(ranks) == replace(problem, num_parts=2).cost(nodes) + inside


traces = st.builds(
    lambda tokens, layers, top_k, seed: RoutingTrace.from_arrays(
        np.random.default_rng(seed).permuted(np.tile(np.arange(8), (tokens, layers, 1)), axis=2)[..., :top_k],
        num_experts=8,
    ),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 10**6),
)


@given(trace=traces, parts=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_cost_bounds_the_messages_of_an_owner_chosen_by_chance(
    trace: RoutingTrace, parts: int, seed: int
) -> None:
    problem = problem_from_counts(count_affinity(trace), parts)
    assignment = random(*problem.shape, seed)
    within, between = slow_messages(trace, assignment)
    only_within = replace(problem, inter=np.zeros_like(problem.inter)).cost(assignment)
    cost = problem.cost(assignment)
    assert cost >= within + between - 1e-9
    assert (cost == 0) == (within + between == 0)
    if trace.top_k == 1:
        assert cost == pytest.approx(between)
        assert only_within == 0
    if trace.top_k == 2:
        assert only_within == pytest.approx(within)


def slow_messages(trace: RoutingTrace, assignment: np.ndarray) -> tuple[float, float]:
    """Per token: 2 (|G_l| - 1) over all layers, and [o not in G_l] averaged over who was chosen before."""
    within = between = 0.0
    for token in trace.experts:
        parts = [assignment[layer, experts].tolist() for layer, experts in enumerate(token)]
        within += sum(2 * (len(set(here)) - 1) for here in parts)
        between += sum(np.mean([owner not in after for owner in before]) for before, after in pairwise(parts))
    return within / trace.num_tokens, between / trace.num_tokens


def test_top_1_cost_is_exactly_the_crossings_per_token() -> None:
    experts = np.array([[0, 0, 2], [1, 3, 3], [2, 2, 1], [3, 1, 0]])
    problem = problem_from_counts(count_affinity(RoutingTrace.from_arrays(experts, num_experts=4)), 2)
    crossings = sum(one // 2 != other // 2 for token in experts for one, other in pairwise(token))
    assert crossings == 4
    assert problem.cost(contiguous(3, 4, 2)) == crossings / 4
    assert not problem.intra.any()


def test_plans_of_lower_cost_send_fewer_messages() -> None:
    trace = topical_trace(tokens=2000, layers=6, top_k=2)
    problem = problem_from_counts(count_affinity(trace), 4)
    plans = [random(*problem.shape, seed) for seed in range(8)]
    best = sweep(problem, contiguous(*problem.shape))
    plans += [shuffled_layers(best, count, seed) for count, seed in product(range(6), range(3))]
    messages = [
        count_traffic(trace, Plan.from_ranks(plan, Topology(gpus_per_node=4), trace, method=""), 4).messages
        for plan in plans
    ]
    agreement = spearmanr([problem.cost(plan) for plan in plans], messages).statistic
    assert agreement > 0.95
    assert min(messages) < 0.7 * messages[0]  # and the plans are worth telling apart


def topical_trace(tokens: int, layers: int, top_k: int) -> RoutingTrace:
    """Tokens of four topics; three of four times a token picks one of its topic's four experts, of 16."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 4, tokens)
    of_topic = rng.permuted(np.tile(np.arange(16), (layers, 1)), axis=1).reshape(layers, 4, 4)
    score = rng.random((tokens, layers, 16))
    for layer in range(layers):
        np.put_along_axis(score[:, layer], of_topic[layer, topic], rng.random((tokens, 4)) + 0.6, axis=1)
    return RoutingTrace.from_arrays(score.argsort(axis=2)[..., ::-1][..., :top_k], num_experts=16)


def shuffled_layers(assignment: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The assignment with `count` of its layers replaced by random ones."""
    rng = np.random.default_rng(seed)
    changed = assignment.copy()
    layers = rng.permutation(len(assignment))[:count]
    changed[layers] = rng.permuted(assignment[layers], axis=1)
    return changed


def test_pairs_of_co_selected_experts_are_priced_once() -> None:
    trace = RoutingTrace.from_arrays(np.array([[[0, 1, 2, 3]]]), num_experts=4)
    problem = problem_from_counts(count_affinity(trace), 4)
    for e, f in combinations(range(4), 2):
        assert problem.intra[0, e, f] == problem.intra[0, f, e] == 4 / 4
    assert problem.cost(contiguous(1, 4, 4)) == 2 * (4 - 1)  # exact when all are apart


def test_an_empty_trace_is_refused() -> None:
    trace = RoutingTrace.from_arrays(np.zeros((0, 2, 1), dtype=np.uint8), num_experts=4)
    with pytest.raises(InputError, match="no tokens; record some"):
        problem_from_counts(count_affinity(trace), 2)


def test_experts_that_do_not_divide_are_refused_with_the_numbers() -> None:
    trace = RoutingTrace.from_arrays(np.array([[0, 1]]), num_experts=8)
    with pytest.raises(InputError, match="8 experts cannot be spread evenly over 3 parts"):
        problem_from_counts(count_affinity(trace), 3)
