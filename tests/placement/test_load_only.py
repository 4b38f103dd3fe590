from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.solve.load_only import _pack, load_only, replica_counts

Case = tuple[np.ndarray, int, int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Loads [L, E], many of them equal or zero, ranks, nodes and slots."""
    num_nodes = draw(st.integers(1, 3))
    num_ranks = num_nodes * draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, 12))
    per_rank = -(-num_experts // num_ranks) + draw(st.integers(0, 4))
    row = st.lists(st.integers(0, 20), min_size=num_experts, max_size=num_experts)
    load = draw(st.lists(row, min_size=1, max_size=2))
    return np.array(load), num_ranks, num_nodes, per_rank * num_ranks


def test_the_heaviest_go_first_each_onto_the_lightest_rank_with_a_slot() -> None:
    # 9 to rank 0, 5 and 4 to rank 1, which then is full; 1 to rank 0, lighter or not.
    assert load_only(np.array([[1, 9, 4, 5]]), 2).tolist() == [[0, 1, 2, 3]]
    assert load_only(np.array([[9, 5, 4, 1]]), 2).tolist() == [[0, 3, 1, 2]]


def test_the_spare_slots_go_to_the_hottest_experts() -> None:
    """8 becomes 4 and 4, one a rank, the most there can be; then 2 becomes 1 and 1."""
    assert load_only(np.array([[8, 1, 1, 2]]), 2, num_slots=6).tolist() == [[0, 1, 3, 0, 2, 3]]


def test_nodes_are_levelled_before_the_ranks_inside_them() -> None:
    """Over four ranks at once 8 and 7 would share a node; here each node gets 9 of 18."""
    assert load_only(np.array([[8, 7, 2, 1]]), 4, num_nodes=2).tolist() == [[0, 3, 1, 2]]


def test_by_default_there_are_as_few_slots_as_can_be() -> None:
    assert load_only(np.ones((3, 10)), 4).shape == (3, 12)


def test_ranks_that_fill_up_do_not_push_two_replicas_together() -> None:
    """Sorting by load alone would fill ranks 1 and 2 with 6, 2 and 1, and leave rank 0 both last replicas."""
    packs = _pack(np.array([9.0, 6, 2, 1, 1]), np.array([1, 2, 2, 2, 2]), 3)
    assert packs.sum(axis=1).tolist() == [3, 3, 3]
    assert packs.sum(axis=0).tolist() == [1, 2, 2, 2, 2]
    assert packs.max() == 1


def test_layers_without_any_load_are_fine() -> None:
    assert sorted(load_only(np.zeros((1, 4)), 2, num_slots=8)[0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_expert_gets_one_replica_a_rank_before_others_are_passed_over() -> None:
    assert replica_counts(np.array([[100, 1, 1]]), 6, 2).tolist() == [[2, 2, 2]]
    assert replica_counts(np.array([[100, 0, 0]]), 7, 2).tolist() == [[3, 2, 2]]
    assert replica_counts(np.array([[5, 1]]), 4, 1).tolist() == [[2, 2]]


@settings(deadline=None, max_examples=300)
@given(cases())
def test_every_expert_is_there_and_ranks_are_ascending_and_equally_full(case: Case) -> None:
    load, num_ranks, num_nodes, num_slots = case
    slots = load_only(load, num_ranks, num_nodes, num_slots)
    assert slots.dtype == np.int64
    assert slots.shape == (len(load), num_slots)
    by_rank = slots.reshape(len(load), num_ranks, -1)
    assert np.array_equal(by_rank, np.sort(by_rank, axis=2))
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in slots])
    assert np.array_equal(counts, replica_counts(load, num_slots, num_ranks))


@settings(deadline=None, max_examples=300)
@given(cases())
def test_replicas_of_an_expert_are_spread_over_ranks_and_nodes_as_evenly_as_can_be(case: Case) -> None:
    load, num_ranks, num_nodes, num_slots = case
    for row in load_only(load, num_ranks, num_nodes, num_slots):
        for packs in (num_ranks, num_nodes):
            held = np.stack([np.bincount(pack, minlength=load.shape[1]) for pack in row.reshape(packs, -1)])
            assert (held.max(axis=0) - held.min(axis=0) <= 1).all()


@settings(deadline=None, max_examples=300)
@given(cases())
def test_the_busiest_rank_has_no_more_than_the_bounds_allow(case: Case) -> None:
    """Bounds: the mean of all ranks, and the load of the heaviest replicas that fill one rank."""
    load, num_ranks, _, num_slots = case
    counts = replica_counts(load, num_slots, num_ranks)
    for row, count, loads in zip(load_only(*case), counts, load, strict=True):
        weight = loads / count
        busiest = weight[row].reshape(num_ranks, -1).sum(axis=1).max()
        heaviest = np.sort(np.repeat(weight, count))[::-1][: num_slots // num_ranks]
        assert loads.sum() / num_ranks - 1e-9 <= busiest <= heaviest.sum() + 1e-9


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=12), st.integers(2, 4))
def test_with_two_slots_a_rank_the_busiest_has_as_little_as_can_be(load: list[int], num_ranks: int) -> None:
    """The heaviest with the lightest, and so on."""
    row = np.array((load * 8)[: 2 * num_ranks])
    busiest = row[load_only(row[None], num_ranks)[0]].reshape(num_ranks, 2).sum(axis=1).max()
    ordered = np.sort(row)
    assert busiest == (ordered + ordered[::-1]).max()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_no_other_numbers_of_replicas_have_less_load_on_the_hottest(
    load: list[int], spare: int, num_ranks: int
) -> None:
    num_slots = min(len(load) + spare, len(load) * num_ranks)
    counts = replica_counts(np.array([load]), num_slots, num_ranks)[0]
    assert counts.sum() == num_slots
    assert counts.min() >= 1
    assert counts.max() <= num_ranks
    others = product(range(1, num_ranks + 1), repeat=len(load))
    least = min(np.max(np.array(load) / each) for each in others if sum(each) == num_slots)
    assert np.max(np.array(load) / counts) == pytest.approx(least)


def test_beyond_one_replica_a_rank_all_experts_get_further_ones_alike() -> None:
    assert replica_counts(np.array([[9, 1, 1]]), 11, 2).tolist() == [[4, 4, 3]]


@pytest.mark.parametrize(
    ("load", "ranks_nodes_slots", "message"),
    [
        (np.ones((2, 4)), (3, 2), "3 ranks cannot be shared equally by 2 nodes; give a multiple, 1 at least"),
        (np.ones((2, 4)), (0,), "0 ranks cannot be shared equally by 1 nodes; give a multiple, 1 at least"),
        (np.ones((2, 4)), (4, 1, 6), "6 slots cannot be shared equally by 4 ranks; give a multiple"),
        (np.ones((2, 4)), (2, 1, 2), "2 slots do not hold 4 experts; give as many at least"),
        (np.ones(4), (2,), "load: has the shape (4,); give [layers, experts], one expert at least"),
        (
            -np.ones((2, 4)),
            (2,),
            "load: holds negative or non-finite values; give counts or shares of tokens",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_value_and_remedy(
    load: np.ndarray, ranks_nodes_slots: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError) as error:
        load_only(load, *ranks_nodes_slots)
    assert str(error.value) == message


def test_replicas_for_no_rank_are_refused() -> None:
    with pytest.raises(InputError, match="num_ranks is 0; give 1 or more"):
        replica_counts(np.ones((2, 4)), 4, 0)


def test_where_the_hot_experts_lie_together_it_beats_the_contiguous_order() -> None:
    """Redundant slots widen the lead, since they split the hottest experts; equal loads give equal slots."""
    load = np.array([[32, 16, 8, 4, 2, 2, 1, 1]])

    def imbalance(slots: np.ndarray, count: np.ndarray) -> float:
        held = (load / count)[0][slots[0]].reshape(4, -1).sum(axis=1)
        return float(held.max() / held.mean())

    once = np.ones_like(load)
    packed, spare = load_only(load, 4), load_only(load, 4, num_slots=12)
    assert imbalance(packed, once) < imbalance(np.arange(8)[None], once)
    assert imbalance(spare, replica_counts(load, 12, 4)) < imbalance(packed, once)
    assert np.array_equal(load_only(load, 4, num_slots=12), spare)
