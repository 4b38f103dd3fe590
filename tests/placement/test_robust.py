from collections.abc import Callable

import numpy as np
import pytest

from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.robust import messages, place_for_the_worst
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.trace import RoutingTrace

TWO = Topology(gpus_per_node=2)


def domain(seed: int, tokens: int, groups: np.ndarray, noise: list[float]) -> RoutingTrace:
    """Tokens stay in one of two groups of experts [E], but for the noise of each layer; top-1."""
    rng = np.random.default_rng(seed)
    num_experts, shape = len(groups), (tokens, len(noise))
    sides = np.stack([np.flatnonzero(groups == side) for side in (0, 1)])
    experts = sides[rng.integers(0, 2, tokens)[:, None], rng.integers(0, num_experts // 2, shape)]
    stray = rng.random(shape) < noise
    experts[stray] = rng.integers(0, num_experts, stray.sum())
    return RoutingTrace.from_arrays(experts, num_experts=num_experts, sequence=np.arange(tokens) // 20)


@pytest.fixture(scope="module")
def opposite() -> list[RoutingTrace]:
    """Two domains: in one, experts 0 to 3 of all layers go together; in the other, the even ones.

    The first says so in the first layers mainly, the other in the last; and it has the most tokens by far.
    """
    halves, parity = np.arange(8) // 4, np.arange(8) % 2
    clear, vague = [0.02, 0.02, 0.02], [0.6, 0.6, 0.6]
    return [domain(0, 6000, halves, clear + vague), domain(1, 400, parity, vague + clear)]


def worst(plan: Plan, traces: list[RoutingTrace]) -> float:
    return max(messages(plan, trace) for trace in traces)


def test_its_worst_is_at_most_that_of_other_plans(opposite: list[RoutingTrace]) -> None:
    solving, balance = Solving("exact"), Objective(balance_price=0.0)
    plan = place_for_the_worst(opposite, TWO, solving=solving, objective=balance)
    merged = place(opposite, TWO, solving=solving, objective=balance)
    alone = [place(trace, TWO, solving=solving, objective=balance) for trace in opposite]
    figures = [worst(other, opposite) for other in (merged, *alone)]
    assert worst(plan, opposite) <= min(figures)
    assert worst(plan, opposite) < 0.9 * worst(alone[0], opposite)  # each is bad for the other's domain
    assert worst(plan, opposite) < 0.9 * worst(alone[1], opposite)


def test_the_figures_are_those_on_all_traces_together(opposite: list[RoutingTrace]) -> None:
    plan = place_for_the_worst(opposite, TWO, solving=Solving("exact"))
    rows = [trace.experts for trace in opposite]
    sequence = [opposite[0].sequence, opposite[1].sequence + opposite[0].sequence.max() + 1]
    together = RoutingTrace.from_arrays(
        np.concatenate(rows), num_experts=8, sequence=np.concatenate(sequence)
    )
    assert plan.expected == evaluate(plan, together)


def test_of_equal_traces_none_is_the_worst(opposite: list[RoutingTrace]) -> None:
    """The plan is the one that any of them alone leads to."""
    plan = place_for_the_worst([opposite[0]] * 3, TWO, solving=Solving("exact"))
    alone = place(opposite[0], TWO, solving=Solving("exact"))
    assert messages(plan, opposite[0]) == pytest.approx(messages(alone, opposite[0]))


def test_it_is_told_of_every_round_and_repeats_itself(opposite: list[RoutingTrace]) -> None:
    told: list[tuple[int, float]] = []
    tell: Callable[[int, float], None] = lambda done, least: told.append((done, least))  # noqa: E731
    plan = place_for_the_worst(opposite, TWO, solving=Solving("exact"), tell=tell)
    again = place_for_the_worst(opposite, TWO, solving=Solving("exact"))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    least = [figure for _, figure in told]
    assert least == sorted(least, reverse=True)
    assert least[-1] == worst(plan, opposite)
    assert np.array_equal(plan.physical_to_logical_map, again.physical_to_logical_map)


def test_messages_are_those_of_the_plans_own_strategy(opposite: list[RoutingTrace]) -> None:
    for strategy, key in (("coherent", "coherent"), ("dispatch-combine", "dispatch_combine")):
        objective = Objective(strategy=strategy)  # type: ignore[arg-type]
        plan = place_for_the_worst(opposite, TWO, solving=Solving("exact"), objective=objective)
        assert plan.strategy == strategy
        for trace in opposite:
            figures = evaluate(plan, trace)["strategies"][key]
            assert messages(plan, trace) == figures["messages_per_token_layer"]


def test_traces_without_any_message_weigh_alike() -> None:
    still = [RoutingTrace.from_arrays(np.zeros((20, 2), int), num_experts=2, sequence=[0] * 20)] * 2
    plan = place_for_the_worst(still, Topology(gpus_per_node=1), solving=Solving("exact"))
    assert messages(plan, still[0]) == 0


def test_it_knows_redundant_experts(opposite: list[RoutingTrace]) -> None:
    solving = Solving("sweep")
    plan = place_for_the_worst(opposite, TWO, solving=solving, redundant_experts=2)
    merged = place(opposite, TWO, solving=solving, redundant_experts=2)
    assert plan.num_slots == 10
    assert worst(plan, opposite) <= worst(merged, opposite)


def test_other_weights_are_not_overruled_by_the_tokens() -> None:
    """The order of ids is best for the long trace and for both together; the weights favour the other."""
    halves, parity = np.arange(8) // 4, np.arange(8) % 2
    traces = [domain(0, 2000, halves, [0.05] * 3), domain(1, 200, parity, [0.05] * 3)]
    plan = place(traces, TWO, weights=[1.0, 100.0], solving=Solving("exact"))
    assert plan.optimal
    assert messages(plan, traces[1]) < 0.5 * messages(plan, traces[0])
