import math
import re
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement import learning_curve as module
from exflow.placement.learning_curve import Point, learning_curve, verdict
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.confidence import interval, split_by_sequence
from exflow.profiling.merge import of_sequences
from exflow.profiling.trace import RoutingTrace

FOUR = Topology(gpus_per_node=4)
OBJECTIVE, SOLVING = Objective(), Solving("sweep")


def planted(
    sequences: int, tokens: int = 8, experts: int = 16, layers: int = 4, stay: float = 0.8
) -> RoutingTrace:
    """Four groups of experts a layer; a token stays in its group with probability `stay`."""
    rng = np.random.default_rng(0)
    rows, size = sequences * tokens, experts // 4
    group = rng.integers(0, 4, (rows, layers))
    for layer in range(1, layers):
        group[:, layer] = np.where(rng.random(rows) < stay, group[:, layer - 1], group[:, layer])
    member = rng.integers(0, size, (rows, layers))
    names = np.stack([rng.permutation(experts) for _ in range(layers)])
    return RoutingTrace.from_arrays(
        names[np.arange(layers), group * size + member],
        num_experts=experts,
        sequence=np.repeat(np.arange(sequences), tokens),
    )


@pytest.fixture(scope="module")
def curve() -> list[Point]:
    return learning_curve(planted(128), FOUR, objective=OBJECTIVE, solving=SOLVING)


def test_each_point_has_twice_the_sequences_of_the_one_before(curve: list[Point]) -> None:
    assert [point.sequences for point in curve] == [3, 6, 12, 24, 48, 96]
    assert [point.tokens for point in curve] == [8 * point.sequences for point in curve]


def test_more_tokens_bring_own_and_held_out_figures_together(curve: list[Point]) -> None:
    first, last = curve[0], curve[-1]
    assert last.held_out < first.held_out / 1.5
    assert abs(last.gap) < first.gap / 3
    for point in curve:
        assert point.low <= point.held_out <= point.high


def test_the_last_point_is_the_plan_from_all_that_is_not_held_out(curve: list[Point]) -> None:
    train, held_out = split_by_sequence(planted(128), 0.25)
    plan = place(train, FOUR, objective=OBJECTIVE, solving=SOLVING)
    messages = interval(plan, held_out)["messages_per_token_layer"]
    last = curve[-1]
    assert (last.held_out, last.low, last.high) == (messages["value"], messages["low"], messages["high"])
    assert last.on_its_own == plan.expected["strategies"]["coherent"]["messages_per_token_layer"]


def test_the_verdict_on_few_and_on_many_tokens(curve: list[Point]) -> None:
    assert verdict(curve[:3]).startswith("More tokens may help")
    many = learning_curve(planted(256, stay=0.9), FOUR, objective=OBJECTIVE, solving=SOLVING, points=2)
    assert verdict(many).startswith("Enough tokens were profiled")


def test_the_seed_draws_the_order_of_sequences_and_tell_is_told(curve: list[Point]) -> None:
    told: list[int] = []
    again = learning_curve(planted(128), FOUR, objective=OBJECTIVE, solving=SOLVING, tell=told.append)
    assert again == curve
    assert told == [point.tokens for point in curve]
    other = learning_curve(planted(128), FOUR, objective=OBJECTIVE, solving=Solving("sweep", seed=1))
    assert other[0].on_its_own != curve[0].on_its_own


def test_every_point_has_an_equal_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def recorded(*arguments: Any, solving: Solving, **named: Any) -> Any:
        limits.append(solving.time_limit)
        return place(*arguments, solving=SOLVING, **named)

    monkeypatch.setattr(module, "place", recorded)
    learning_curve(planted(16), FOUR, objective=OBJECTIVE, solving=Solving("sweep", time_limit=60), points=3)
    assert limits == [20, 20, 20]


def test_points_without_sequences_are_left_out() -> None:
    points = learning_curve(planted(7), FOUR, objective=OBJECTIVE, solving=SOLVING, points=9)
    assert [point.sequences for point in points] == [1, 3, 6]


def test_points_that_cannot_keep_the_cap_are_left_out() -> None:
    """A token of one sequence has all its load on one rank; only the whole is level."""
    experts = np.arange(4).repeat(2).reshape(8, 1).repeat(2, axis=1)
    trace = RoutingTrace.from_arrays(experts, num_experts=4, sequence=[0, 1, 0, 1, 0, 1, 0, 1])
    capped = Objective(max_imbalance=1.0)
    points = learning_curve(trace, FOUR, objective=capped, solving=SOLVING, share=0.5)
    assert [point.sequences for point in points] == [1]
    uneven = trace.select(trace.experts[:, 0, 0] > 0)
    with pytest.raises(InputError, match="imbalance"):
        learning_curve(uneven, FOUR, objective=capped, solving=SOLVING, share=0.5)


def test_redundant_experts_and_strategies() -> None:
    points = learning_curve(
        planted(16),
        Topology(num_nodes=2, gpus_per_node=2),
        objective=Objective("dispatch-combine"),
        solving=SOLVING,
        points=1,
        redundant_experts=4,
    )
    train, held_out = split_by_sequence(planted(16), 0.25)
    plan = place(
        of_sequences(train, np.arange(12)),
        Topology(num_nodes=2, gpus_per_node=2),
        objective=Objective("dispatch-combine"),
        solving=SOLVING,
        redundant_experts=4,
    )
    assert points[0].held_out == interval(plan, held_out)["messages_per_token_layer"]["value"]


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="3 sequence"):
        learning_curve(planted(3), FOUR, objective=OBJECTIVE, solving=SOLVING)
    with pytest.raises(InputError, match="points of the learning curve are 0"):
        learning_curve(planted(8), FOUR, objective=OBJECTIVE, solving=SOLVING, points=0)
    with pytest.raises(InputError, match="is unknown"):
        learning_curve(planted(8), FOUR, objective=OBJECTIVE, solving=Solving("magic"))


def points_of(*figures: tuple[float, float], width: float = 0.0) -> list[Point]:
    """Make points from pairs of messages: on a point's own and on held-out tokens."""
    return [
        Point(1000 << i, 10 << i, own, held_out, held_out - width / 2, held_out + width / 2)
        for i, (own, held_out) in enumerate(figures)
    ]


@pytest.mark.parametrize(
    ("points", "start"),
    [
        (points_of((0.9, 1.004), (0.98, 1.0)), "Enough"),  # 0.4% gained, 2% apart
        (points_of((0.9, 1.006), (0.98, 1.0)), "More"),  # 0.6% gained
        (points_of((0.9, 1.006), (0.98, 1.0), width=0.014), "Enough"),  # but half the interval is 0.7%
        (points_of((0.9, 1.001), (0.96, 1.0)), "More"),  # 4% apart
        (points_of((0.9, 0.99), (0.98, 1.0)), "Enough"),  # chance: it got worse
        (points_of((1.0, 0.99), (1.1, 0.99)), "Enough"),  # chance: its own are the harder
        (points_of((0.0, 0.0), (0.0, 0.0)), "Enough"),  # one GPU
        (points_of((0.0, 0.0), (0.0, 0.1)), "More"),
        (points_of((1.0, 1.0)), "Cannot say"),
        ([], "Cannot say"),
    ],
)
def test_what_is_enough(points: list[Point], start: str) -> None:
    sentence = verdict(points)
    assert sentence.startswith(start)
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert "nan" not in sentence
    assert "inf" not in sentence


def test_gains_that_halve_are_extrapolated_so() -> None:
    """1.6, 1.2, 1.0: then 0.9, 0.85, ... down to 0.8."""
    sentence = verdict(points_of((0.2, 1.6), (0.3, 1.2), (0.5, 1.0)))
    assert "going from 2,000 to 4,000 tokens brought 16.7% fewer messages on held-out sequences" in sentence
    assert "the plan sends 50.0% fewer on its own tokens (0.500)" in sentence
    assert "twice the tokens may bring about 10.0% fewer, and any number about 20.0%." in sentence


def test_what_is_expected_keeps_within_the_gap() -> None:
    growing = verdict(points_of((0.2, 1.5), (0.3, 1.3), (0.95, 1.0)))
    assert "about 5.0% fewer, and any number about 5.0%." in growing
    assert "hardly over 5.0%" in verdict(points_of((0.3, 1.3), (0.95, 1.0)))
    assert "hardly over 5.0%" in verdict(points_of((0.2, 1.2), (0.3, 1.3), (0.95, 1.0)))
    assert "nothing to be gained" in verdict(points_of((0.3, 1.3), (1.05, 1.0)))


def test_the_numbers_are_finite(curve: list[Point]) -> None:
    for count in range(len(curve) + 1):
        for number in re.findall(r"\d[\d,]*\.?\d*", verdict(curve[:count])):
            assert math.isfinite(float(number.replace(",", "")))
