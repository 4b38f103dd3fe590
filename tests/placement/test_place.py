"""Plans from traces, end to end, on small traces whose affinity is known."""

from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement import make_plan as module
from exflow.placement.make_plan import BASELINES, Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import OWNED, Strategy
from exflow.placement.plan.topology import INTER_NODE_COST, Topology
from exflow.placement.solve import anneal as search
from exflow.placement.solve.objective import Objective
from exflow.placement.solve.solve import METHODS
from exflow.placement.traffic.evaluate import evaluate
from exflow.placement.traffic.traffic import imbalance
from exflow.profiling.merge import merge
from exflow.profiling.trace import RoutingTrace
from tests.placement.planted import FOUR, TWO, TWO_NODES, check_valid, messages, planted, traffic


@pytest.fixture(autouse=True)
def two_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the search does for problems so small."""
    monkeypatch.setattr(search, "_MOST_TRIALS", 300_000)


MOST_TRIALS = search._MOST_TRIALS


def cost_of_links(plan: Plan, trace: RoutingTrace) -> float:
    counted = traffic(plan, trace)
    return counted.intra_node + INTER_NODE_COST * counted.inter_node


@pytest.mark.parametrize("method", [*METHODS, *BASELINES])
@pytest.mark.parametrize("topology", [TWO, FOUR, TWO_NODES], ids=str)
def test_every_method_gives_a_valid_plan(method: str, topology: Topology) -> None:
    trace, _ = planted(experts=8, groups=topology.num_ranks, tokens=400, top_k=2)
    plan = place(trace, topology, solving=Solving(method, time_limit=3))
    check_valid(plan, trace, topology, 8)
    assert plan.strategy == "coherent"
    contiguous = place(trace, topology, solving=Solving("contiguous"))
    if method in BASELINES:
        assert plan.method == method
        assert plan.objective is None
        assert not plan.optimal
    else:
        assert messages(plan, trace) < messages(contiguous, trace)
    if method == "exact" and topology is not TWO_NODES:
        assert plan.optimal
        assert plan.objective == plan.lower_bound
        assert plan.gap == 0


@pytest.mark.parametrize(("topology", "experts"), [(TWO, 8), (FOUR, 16)], ids=str)
def test_planted_groups_are_found(topology: Topology, experts: int) -> None:
    """Exactly, and by search."""
    trace, of = planted(experts=experts, groups=topology.num_ranks, noise=0.05)
    plan = place(trace, topology)
    ranks = plan.rank_of_expert
    assert len({*zip(of.ravel().tolist(), ranks.ravel().tolist(), strict=True)}) == topology.num_ranks


def test_the_plan_survives_its_file(tmp_path: Any) -> None:
    trace, _ = planted(tokens=300)
    plan = place(trace, TWO_NODES, redundant_experts=3)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert np.array_equal(again.physical_to_logical_map, plan.physical_to_logical_map)
    assert evaluate(again, trace) == again.expected == plan.expected


@pytest.mark.parametrize("method", ["auto", "sweep", "random"])
def test_the_same_seed_gives_the_same_plan(method: str) -> None:
    trace, _ = planted(noise=0.6)
    one, other = (place(trace, FOUR, solving=Solving(method, seed=5)) for _ in range(2))
    assert np.array_equal(one.physical_to_logical_map, other.physical_to_logical_map)
    assert one.objective == other.objective


def test_a_plan_of_a_long_trace_is_of_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing at random, of which the contiguous plan is the best by a hair."""
    monkeypatch.setattr(module, "_JUDGES", 400)
    experts = np.random.default_rng(5).integers(0, 8, (2000, 3, 2))
    trace = RoutingTrace.from_arrays(experts, num_experts=8, sequence=np.arange(2000) // 10)
    objective = Objective("dispatch-combine")
    plan = place(trace, FOUR, solving=Solving("sweep"), objective=objective)
    assert plan.method == "contiguous"
    assert plan.trace_digest == trace.digest()


# Several traces.


def test_weights_decide_between_traces() -> None:
    one, other = planted(0, kinds=0, tokens=600)[0], planted(1, kinds=1, tokens=600)[0]
    ours = place([one, other], FOUR, weights=[1, 1e-6])
    theirs = place([one, other], FOUR, weights=[1e-6, 1])
    assert messages(ours, one) < 0.7 * messages(theirs, one)
    assert messages(theirs, other) < 0.7 * messages(ours, other)
    scaled = place([one, other], FOUR, weights=[1000, 1e-3])
    assert messages(scaled, one) == pytest.approx(messages(ours, one))


def test_by_default_tokens_are_the_weights() -> None:
    one, other = planted(0, kinds=0, experts=8, groups=2)[0], planted(1, kinds=1, experts=8, groups=2)[0]
    both = [one, other.select(np.arange(200))]
    plan = place(both, TWO, solving=Solving("exact"))
    check_valid(plan, merge(both), TWO, 8)
    merged = place(merge(both), TWO, solving=Solving("exact"))
    weighted = place(both, TWO, solving=Solving("exact"), weights=[1200, 200])
    assert plan.objective == pytest.approx(merged.objective)
    assert plan.objective == pytest.approx(weighted.objective)
    assert messages(plan, merge(both)) == pytest.approx(messages(merged, merge(both)))


def test_traces_must_be_of_one_model_and_hold_tokens() -> None:
    trace = planted(tokens=100)[0]
    with pytest.raises(InputError, match="give traces of one model"):
        place([trace, planted(experts=8)[0]], FOUR)
    for method in ("auto", "contiguous", "load-only"):
        with pytest.raises(InputError, match="holds no tokens; record some before placing"):
            place(trace.select(np.zeros(100, dtype=bool)), FOUR, solving=Solving(method))
    with pytest.raises(InputError, match="holds no tokens"):
        place([trace, trace.select(np.zeros(100, dtype=bool))], FOUR)


# Strategies.


@pytest.mark.parametrize("strategy", OWNED)
@pytest.mark.parametrize("redundant", [0, 4])
def test_a_plan_is_good_at_what_it_was_made_for(strategy: Strategy, redundant: int) -> None:
    trace, _ = planted(experts=8, noise=0.2)
    plan = place(trace, TWO_NODES, objective=Objective(strategy), redundant_experts=redundant)
    check_valid(plan, trace, TWO_NODES, 8 + redundant)
    assert plan.strategy == strategy
    assert plan.group_size == {"coherent": 4, "node-coherent": 2, "dispatch-combine": 1}[strategy]
    for method in BASELINES:
        solving = Solving(method)
        base = place(
            trace, TWO_NODES, objective=Objective(strategy), redundant_experts=redundant, solving=solving
        )
        assert base.strategy == strategy
        assert cost_of_links(plan, trace) <= cost_of_links(base, trace)
        if not redundant:
            assert cost_of_links(plan, trace) < 0.8 * cost_of_links(base, trace)


def test_for_dispatch_combine_it_does_not_matter_what_a_token_did_before() -> None:
    """Every layer's choices dealt out to the tokens anew: the same plan. For coherence all is lost."""
    trace, _ = planted(noise=0.2)
    rng = np.random.default_rng(3)
    dealt = [rng.permutation(trace.num_tokens) for _ in range(trace.num_layers)]
    experts = np.stack([trace.experts[row, layer] for layer, row in enumerate(dealt)], axis=1)
    mixed = replace(trace, experts=experts)
    apart = Objective("dispatch-combine")
    plans = [place(each, FOUR, objective=apart) for each in (trace, mixed)]
    assert np.array_equal(plans[0].physical_to_logical_map, plans[1].physical_to_logical_map)
    assert plans[0].objective == plans[1].objective
    assert messages(place(mixed, FOUR), mixed) > 1.5 * messages(place(trace, FOUR), trace)


def test_for_dispatch_combine_layers_are_placed_each_by_itself() -> None:
    trace, _ = planted(experts=8, groups=2, noise=0.4)
    objective, solving = Objective("dispatch-combine"), Solving("exact")
    whole = place(trace, TWO, objective=objective, solving=solving)
    singles = [
        RoutingTrace.from_arrays(trace.experts[:, [layer]], num_experts=8, sequence=trace.sequence)
        for layer in range(trace.num_layers)
    ]
    alone = [place(each, TWO, objective=objective, solving=solving).objective for each in singles]
    assert whole.objective == pytest.approx(sum(cost for cost in alone if cost is not None))


def test_balance_is_bought_at_its_price() -> None:
    trace, _ = planted(hot=0.9, noise=0.3)
    plans = [place(trace, FOUR, objective=Objective(balance_price=price)) for price in (0.0, 30.0)]
    assert imbalance(trace, plans[1]).mean() < imbalance(trace, plans[0]).mean()
    assert messages(plans[0], trace) <= messages(plans[1], trace)


# Nodes.


def test_groups_of_groups_are_found_on_two_nodes() -> None:
    """Groups 0 and 1, and 2 and 3, are siblings: a third of the steps goes from one to the other."""
    trace, of = planted(experts=8, siblings=0.33, noise=0.05)
    plan = place(trace, TWO_NODES)
    contiguous = place(trace, TWO_NODES, solving=Solving("contiguous"))
    assert traffic(plan, trace).inter_node < 0.3 * traffic(contiguous, trace).inter_node
    node = plan.rank_of_expert // 2
    assert len({*zip((of // 2).ravel().tolist(), node.ravel().tolist(), strict=True)}) == 2
    assert len({*zip(of.ravel().tolist(), plan.rank_of_expert.ravel().tolist(), strict=True)}) == 4


def test_dear_links_are_spared() -> None:
    """Ranks 0 and 2, and 1 and 3, are near; nothing else says so."""
    trace, of = planted(siblings=0.33, noise=0.05)
    near = np.array([[0, 9, 1, 9], [9, 0, 9, 1], [1, 9, 0, 9], [9, 1, 9, 0]], dtype=float)
    topology = Topology(gpus_per_node=4, link_cost=tuple(map(tuple, near.tolist())))
    plan = place(trace, topology)
    assert (
        len({*zip((of // 2).ravel().tolist(), (plan.rank_of_expert % 2).ravel().tolist(), strict=True)}) == 2
    )


# Settings.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Solving("magic"), r"method 'magic' is unknown; give one of auto, .*, load-only"),
        (
            lambda: place(planted(tokens=60)[0], FOUR, redundant_experts=-1),
            "redundant experts are -1; choose",
        ),
        (lambda: place(planted(tokens=60)[0], FOUR, solving=Solving(time_limit=-1.0)), "time limit -1"),
        (
            lambda: place(planted(tokens=60)[0], FOUR, solving=Solving("exact")),
            "over the limit.*use method search",
        ),
    ],
)
def test_bad_settings_name_value_and_remedy(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_progress_is_told_ever_better_objectives() -> None:
    told: list[tuple[float, float, float]] = []
    solving = Solving("search", progress=lambda *figures: told.append(figures))
    trace, _ = planted(noise=0.5, layers=6)
    plan = place(trace, FOUR, solving=solving)
    assert told[-1][:2] == (plan.objective, plan.lower_bound)
    assert all(bound <= cost + 1e-9 for cost, bound, _ in told)


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [Topology(num_nodes=2, gpus_per_node=4), pytest.param(Topology(gpus_per_node=8), marks=pytest.mark.all)],
    ids=str,
)
def test_a_time_limit_is_kept_about(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MOST_TRIALS", MOST_TRIALS)
    place(planted(tokens=100)[0], TWO_NODES)  # compiled before the clock starts
    trace, _ = planted(experts=128, groups=8, layers=16, tokens=20_000, noise=0.5)
    began = monotonic()
    plan = place(trace, topology, solving=Solving(time_limit=1))
    assert monotonic() - began < 10  # the limit is on the search; the bound and the evaluation come after it
    assert not plan.optimal
    contiguous = place(trace, topology, solving=Solving("contiguous"))
    assert messages(plan, trace) < messages(contiguous, trace)
