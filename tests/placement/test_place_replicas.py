"""Plans with redundant experts and with layers of different sizes."""

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.make_plan import BASELINES, Solving, place
from exflow.placement.plan.topology import Topology
from exflow.placement.solve import anneal as search
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.traffic import imbalance
from exflow.profiling.trace import RoutingTrace
from tests.placement.planted import FOUR, TWO_NODES, check_valid, messages, planted


@pytest.fixture(autouse=True)
def two_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the search does for problems so small."""
    monkeypatch.setattr(search, "_MOST_TRIALS", 300_000)


# Replicas.


@pytest.mark.parametrize(("redundant", "num_slots"), [(0, 16), (1, 20), (4, 20), (5, 24), (16, 32)])
def test_slots_are_filled_up_until_all_ranks_have_equally_many(redundant: int, num_slots: int) -> None:
    trace, _ = planted(hot=0.7, tokens=400)
    plan = place(trace, FOUR, redundant_experts=redundant)
    check_valid(plan, trace, FOUR, num_slots)
    hosts = plan.hosts.sum(axis=2)
    counts = np.stack([np.bincount(row, minlength=16) for row in plan.physical_to_logical_map])
    assert np.array_equal(hosts, counts)  # no two on one rank


@pytest.mark.parametrize("topology", [FOUR, TWO_NODES], ids=str)
def test_with_replicas_too_affinity_saves_messages(topology: Topology) -> None:
    trace, _ = planted(hot=0.7)
    plan = place(trace, topology, redundant_experts=4)
    for method in BASELINES:
        other = place(trace, topology, redundant_experts=4, solving=Solving(method))
        assert messages(plan, trace) < 0.5 * messages(other, trace)


@pytest.mark.parametrize("redundant", [4, 8])
def test_replicas_do_not_make_more_messages(redundant: int) -> None:
    """An expert of each group is hot; the groups stay whole, and yet."""
    trace, _ = planted(hot=0.7)
    plain, spare = place(trace, FOUR), place(trace, FOUR, redundant_experts=redundant)
    assert messages(spare, trace) <= 1.02 * messages(plain, trace)


def test_replicas_of_one_group_do_not_break_up_others() -> None:
    """Make all hot experts one group: on its rank only another group's expert can fill the slot."""
    trace, of = planted()
    often = of[0, trace.experts[:, 0, 0]] == 0
    skewed = trace.select(often | (np.arange(trace.num_tokens) % 3 == 0))
    plain, spare = place(skewed, FOUR), place(skewed, FOUR, redundant_experts=4)
    assert messages(spare, skewed) <= 1.5 * messages(plain, skewed)


def test_the_cap_holds_for_loads_that_replicas_share_equally() -> None:
    trace, _ = planted(hot=0.9, noise=0.5)
    plan = place(trace, FOUR, redundant_experts=4, objective=Objective(max_imbalance=1.1))
    for layer, row in enumerate(plan.physical_to_logical_map):
        load = np.bincount(trace.experts[:, layer].ravel(), minlength=16)
        held = (load / np.bincount(row, minlength=16))[row].reshape(4, -1).sum(axis=1)
        assert held.max() / held.mean() <= 1.1 + 1e-9


def test_the_cap_holds_without_replicas_and_names_the_least_where_it_cannot() -> None:
    trace, _ = planted(hot=0.8, noise=0.4, tokens=1201)  # odd: a rank has more than another
    plan = place(trace, FOUR, objective=Objective(max_imbalance=1.05))
    assert imbalance(trace, plan).max() <= 1.05
    with pytest.raises(InputError, match=r"max imbalance 1 cannot be kept.*choose 1\.\d+ or more"):
        place(trace, FOUR, objective=Objective(max_imbalance=1.0))
    with pytest.raises(InputError, match=r"method contiguous has imbalance .* use a method that solves"):
        place(trace, FOUR, objective=Objective(max_imbalance=1.01), solving=Solving("contiguous"))


@pytest.mark.parametrize("method", ["auto", "sweep", "contiguous", "random", "load-only"])
def test_where_the_ranks_cannot_share_the_experts_some_get_a_replica(method: str) -> None:
    trace, _ = planted(experts=10, groups=2, tokens=400)
    plan = place(trace, FOUR, solving=Solving(method))
    check_valid(plan, trace, FOUR, 12)


@pytest.mark.parametrize("method", ["auto", "contiguous", "random", "load-only"])
@pytest.mark.parametrize("counts", [(16, 6, 16), (4, 16, 1), (16, 15, 2)], ids=str)
def test_layers_may_have_different_numbers_of_experts(method: str, counts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.integers(0, count, 400) for count in counts], axis=1)
    trace = RoutingTrace.from_arrays(experts, num_experts=16, experts_per_layer=counts)
    plan = place(trace, FOUR, solving=Solving(method))
    check_valid(plan, trace, FOUR, 16)
    assert plan.experts_per_layer == counts
    if method not in ("contiguous", "random"):
        for layer, count in enumerate(counts):
            assert (plan.hosts[layer, :count].sum(axis=1) >= min(16 // count, 4)).all()
