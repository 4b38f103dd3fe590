"""Meaning of the prices of `make_problem`, on traces small enough to follow by hand."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from exflow.errors import InputError
from exflow.placement.counts.affinity import count_affinity
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import INTER_NODE_COST, Topology
from exflow.placement.solve.baselines import contiguous, random
from exflow.placement.solve.descent import sweep
from exflow.placement.solve.objective import BALANCE_PRICE, Objective
from exflow.placement.solve.problem import PlacementProblem
from exflow.placement.traffic.traffic import count_traffic, imbalance
from exflow.profiling.trace import RoutingTrace
from tests.placement.problems import FREE, gpus, problem_of, trace_of


def rows_apart(experts: np.ndarray) -> RoutingTrace:
    """Each row a sequence of its own: row i is at home on rank i modulo G."""
    return RoutingTrace.from_arrays(experts, num_experts=8, sequence=np.arange(len(experts)))


def topical_trace(tokens: int, layers: int, top_k: int) -> RoutingTrace:
    """Tokens of four topics; three of four times a token picks one of its topic's four experts, of 16."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 4, tokens)
    of_topic = rng.permuted(np.tile(np.arange(16), (layers, 1)), axis=1).reshape(layers, 4, 4)
    score = rng.random((tokens, layers, 16))
    for layer in range(layers):
        np.put_along_axis(score[:, layer], of_topic[layer, topic], rng.random((tokens, 4)) + 0.6, axis=1)
    return RoutingTrace.from_arrays(score.argsort(axis=2)[..., ::-1][..., :top_k], num_experts=16)


traces = st.builds(trace_of, st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))


def slow_messages(trace: RoutingTrace, assignment: np.ndarray) -> tuple[float, float]:
    """Per token: 2 (|G_l| - 1) over all layers, and [o not in G_l] averaged over who was chosen before."""
    within = between = 0.0
    for token in trace.experts:
        parts = [assignment[layer, experts].tolist() for layer, experts in enumerate(token)]
        within += sum(2 * (len(set(here)) - 1) for here in parts)
        between += sum(np.mean([owner not in after for owner in before]) for before, after in pairwise(parts))
    return within / trace.num_tokens, between / trace.num_tokens


def in_layer_cost(problem: PlacementProblem, assignment: np.ndarray) -> float:
    apart = assignment[:, :, None] != assignment[:, None, :]
    return float((problem.intra * apart).sum() / 2)


# Coherent, equal distances


@given(trace=traces, parts=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_cost_bounds_the_messages_of_an_owner_chosen_by_chance(
    trace: RoutingTrace, parts: int, seed: int
) -> None:
    problem = problem_of(trace, gpus(parts))
    assignment = random(*problem.shape, seed)
    within, between = slow_messages(trace, assignment)
    cost = problem.cost(assignment)
    assert cost >= within + between - 1e-9
    assert (cost == 0) == (within + between == 0)
    if trace.top_k == 1:
        assert cost == pytest.approx(between)
        assert not problem.intra.any()
    if trace.top_k == 2:
        assert in_layer_cost(problem, assignment) == pytest.approx(within)


@given(trace=traces, parts=st.sampled_from([2, 4]), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_top_1_cost_is_what_the_runtime_sends_after_the_first_layer(
    trace: RoutingTrace, parts: int, seed: int
) -> None:
    first = rows_apart(trace.experts[..., :1])
    ranks = random(first.num_layers, 8, parts, seed)
    plan = Plan.from_ranks(ranks, gpus(parts), first, method="")
    home = np.arange(first.num_tokens) % parts
    entries = int((ranks[0, first.experts[:, 0, 0]] != home).sum())
    messages = count_traffic(first, plan, parts).messages
    assert problem_of(first, gpus(parts)).cost(ranks) * first.num_tokens == pytest.approx(messages - entries)


@pytest.mark.parametrize("top_k", [2, 3, 4])
@pytest.mark.parametrize("parts", [2, 4])
def test_cost_bounds_the_messages_of_the_runtime(top_k: int, parts: int) -> None:
    trace = topical_trace(tokens=500, layers=5, top_k=top_k)
    problem = problem_of(trace, gpus(parts))
    for seed in range(5):
        ranks = random(*problem.shape, seed)
        plan = Plan.from_ranks(ranks, gpus(parts), trace, method="")
        entries = trace.num_tokens  # the first layer may be elsewhere than the home: a message at most
        messages = count_traffic(trace, plan, parts).messages
        assert messages - entries <= problem.cost(ranks) * trace.num_tokens


def test_top_1_cost_is_exactly_the_crossings_per_token() -> None:
    experts = np.array([[0, 0, 2], [1, 3, 3], [2, 2, 1], [3, 1, 0]])
    problem = problem_of(RoutingTrace.from_arrays(experts, num_experts=4), gpus(2))
    crossings = sum(one // 2 != other // 2 for token in experts for one, other in pairwise(token))
    assert crossings == 4
    assert problem.cost(contiguous(3, 4, 2)) == crossings / 4
    assert not problem.intra.any()


def test_pairs_of_co_selected_experts_are_priced_once() -> None:
    trace = RoutingTrace.from_arrays(np.array([[[0, 1, 2, 3]]]), num_experts=4)
    problem = problem_of(trace, gpus(4))
    assert np.array_equal(problem.intra[0], 1 - np.eye(4))  # 4 / k
    assert problem.cost(contiguous(1, 4, 4)) == 2 * (4 - 1)  # exact when all are apart


def test_plans_of_lower_cost_send_fewer_messages() -> None:
    trace = topical_trace(tokens=2000, layers=6, top_k=2)
    problem = problem_of(trace, gpus(4))
    plans = [random(*problem.shape, seed) for seed in range(8)]
    best = sweep(problem, contiguous(*problem.shape))
    plans += [shuffled_layers(best, count, seed) for count, seed in product(range(6), range(3))]
    messages = [
        count_traffic(trace, Plan.from_ranks(plan, gpus(4), trace, method=""), 4).messages for plan in plans
    ]
    agreement = spearmanr([problem.cost(plan) for plan in plans], messages).statistic
    assert agreement > 0.95
    assert min(messages) < 0.7 * messages[0]  # and the plans are worth telling apart


def shuffled_layers(assignment: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The assignment with `count` of its layers replaced by random ones."""
    rng = np.random.default_rng(seed)
    changed = assignment.copy()
    layers = rng.permutation(len(assignment))[:count]
    changed[layers] = rng.permuted(assignment[layers], axis=1)
    return changed


# Other strategies, links, several traces


def test_dispatch_combine_prices_co_selection_alone() -> None:
    trace = trace_of(tokens=30, layers=3, top_k=2, seed=0)
    coherent = problem_of(trace, gpus(4))
    problem = problem_of(trace, gpus(4), Objective("dispatch-combine", 0))
    assert not problem.inter.any()
    assert np.allclose(problem.intra, coherent.intra * (1 - 1 / 4))


def test_dispatch_combine_differs_between_plans_as_the_messages_of_any_home_do() -> None:
    """Means over all homes: 2 (1 - 1/G) |G_l|, of which the cost leaves the first host out."""
    trace = trace_of(tokens=20, layers=2, top_k=2, seed=1)
    everywhere = rows_apart(np.repeat(trace.experts, 4, axis=0))
    problem = problem_of(trace, gpus(4), Objective("dispatch-combine", 0))
    for seed in range(5):
        ranks = random(*problem.shape, seed)
        plan = Plan.from_ranks(ranks, gpus(4), everywhere, method="")
        messages = count_traffic(everywhere, plan, 1).messages / everywhere.num_tokens
        assert problem.cost(ranks) + 2 * 2 * (1 - 1 / 4) == pytest.approx(messages)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_node_coherence_finds_the_owner_in_one_of_so_many_nodes(nodes: int) -> None:
    trace, topology = trace_of(30, 3, 2, seed=0), Topology(num_nodes=nodes, gpus_per_node=4 // nodes)
    coherent = problem_of(trace, topology)
    problem = problem_of(trace, topology, Objective("node-coherent", 0))
    assert np.allclose(problem.inter, coherent.inter / nodes)
    assert np.array_equal(problem.intra, coherent.intra)


def test_a_message_between_nodes_costs_more() -> None:
    trace = RoutingTrace.from_arrays(np.array([[0, 1], [0, 2], [0, 3], [0, 0]]), num_experts=4)
    problem = problem_of(trace, Topology(num_nodes=2, gpus_per_node=2))
    assert problem.cost(contiguous(2, 4, 4)) == (0 + 1 + 2 * INTER_NODE_COST) / 4
    linked = Topology(gpus_per_node=2, link_cost=((0.0, 5.0), (5.0, 0.0)))
    assert problem_of(trace, linked).is_uniform  # in units of the cheapest link


@given(seed=st.integers(0, 10**6), weights=st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * 3))
@settings(max_examples=30, deadline=None)
def test_several_traces_count_by_their_weights_whatever_their_length(
    seed: int, weights: tuple[float, ...]
) -> None:
    several = [trace_of(tokens, 3, 2, seed + tokens) for tokens in (3, 10, 40)]
    objective = Objective(balance_price=2.0)
    together = problem_of(several, gpus(4), objective, weights=weights)
    alone = [problem_of(trace, gpus(4), FREE) for trace in several]
    ranks = random(3, 8, 4, seed)
    mean = np.average([problem.cost(ranks) for problem in alone], weights=weights)
    loads = np.average(
        [each.part_loads(ranks) / each.load.sum(axis=1, keepdims=True) for each in alone], 0, weights
    )
    mean_imbalance = PlacementProblem(
        inter=np.zeros((2, 8, 8)),
        intra=np.zeros((3, 8, 8)),
        load=np.average(
            [each.load / each.load.sum(axis=1, keepdims=True) for each in alone], 0, list(weights)
        ),
        num_parts=4,
        balance_price=np.array([2.0 * 4]),  # a unit is a mean load: a quarter of all
    )
    assert together.cost(ranks) == pytest.approx(mean + mean_imbalance.imbalance_cost(loads))


def test_one_trace_twice_is_that_trace() -> None:
    trace = trace_of(20, 3, 2, seed=0)
    one, two = problem_of(trace, gpus(4)), problem_of([trace, trace], gpus(4), weights=[1, 5])
    for name in ("inter", "intra", "load"):
        assert np.allclose(getattr(one, name), getattr(two, name)), name


def test_loads_of_one_trace_are_whole() -> None:
    trace = trace_of(20, 3, 2, seed=0)
    assert np.array_equal(problem_of(trace, gpus(4), weights=[0.3]).load, count_affinity(trace).load)


# Balance


def test_imbalance_is_priced_in_messages_per_unit() -> None:
    """Put all load on one of two parts: an imbalance of 2, one over the least."""
    trace = RoutingTrace.from_arrays(np.array([[0, 0]] * 10 + [[1, 0]] * 10), num_experts=4)
    problem = problem_of(trace, gpus(2), Objective(balance_price=0.5))
    one_part = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    over = 2 - 2 ** (1 / 16)  # a soft maximum: level loads have that of 2 ** (1/16) times the mean
    assert problem.cost(one_part) == pytest.approx(2 * 0.5 * over)
    level = np.array([[0, 1, 0, 1], [0, 0, 1, 1]])
    assert problem.cost(level) == pytest.approx(0.5 + 0.5 * over)  # level in layer 0; half the tokens cross


def test_balance_has_a_price_by_default() -> None:
    trace = trace_of(20, 3, 2, seed=0)
    problem = problem_of(trace, gpus(4), Objective())
    assert np.allclose(problem.balance_price, BALANCE_PRICE / (20 * 2 / 4))
    assert not problem_of(trace, gpus(4)).balance_price.any()


@given(
    tokens=st.integers(1, 60),
    cap=st.sampled_from([1.0, 1.1, 1.25, 4 / 3, 1.7]),
    parts=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_the_cap_says_what_evaluate_reports(tokens: int, cap: float, parts: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 8, (tokens, 2))
    trace = RoutingTrace.from_arrays(ids, num_experts=8)
    problem = problem_of(trace, gpus(parts), Objective(balance_price=0, max_imbalance=cap))
    ranks = random(2, 8, parts, seed)
    measured = imbalance(trace, Plan.from_ranks(ranks, gpus(parts), trace, method=""))
    assert problem.is_feasible(ranks) == bool((measured <= cap).all())
    mean_load = tokens / parts
    assert (problem.max_load / mean_load <= cap).all()
    assert (np.nextafter(problem.max_load, np.inf) / mean_load > cap).all()


def test_without_a_cap_nothing_is_too_much() -> None:
    assert np.isinf(problem_of(trace_of(20, 3, 2, seed=0), gpus(4)).max_load).all()


# What is refused


def test_an_empty_trace_is_refused() -> None:
    trace = RoutingTrace.from_arrays(np.zeros((0, 2, 1), dtype=np.uint8), num_experts=4)
    with pytest.raises(InputError, match="no tokens; record some"):
        problem_of(trace, gpus(2))
    with pytest.raises(InputError, match="no tokens; record some"):
        problem_of([trace_of(5, 2, 1, seed=0, experts=4), trace], gpus(2))


def test_experts_that_do_not_divide_are_refused_with_the_numbers() -> None:
    trace = RoutingTrace.from_arrays(np.array([[0, 1]]), num_experts=8)
    with pytest.raises(InputError, match="8 experts cannot be spread evenly over 3 parts"):
        problem_of(trace, gpus(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"strategy": "magic"},
            "strategy 'magic' is unknown; choose one of coherent, node-coherent, dispatch",
        ),
        ({"balance_price": -0.1}, "balance price is -0.1; choose a number from 0 up"),
        ({"balance_price": math.inf}, "balance price is inf"),
        ({"balance_price": math.nan}, "balance price is nan"),
        ({"max_imbalance": 0.99}, "max imbalance is 0.99; .*: choose 1 or more"),
        ({"max_imbalance": -1}, "max imbalance is -1; .*: choose 1 or more"),
        ({"max_imbalance": math.nan}, "max imbalance is nan; .*: choose 1 or more"),
        ({"max_imbalance": math.inf}, "max imbalance is inf; .*: choose 1 or more"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Objective(**change)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
