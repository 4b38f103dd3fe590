"""The capacity in a dispatch: alike at both ends, near what is needed, never beyond what there can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exflow.comm.capacity import CapacityEstimator

NARROW, WIDE = 1, 64  # bytes a row, of 1024 that a round would take
ROUND = 1024


def test_at_first_every_other_token_is_expected() -> None:
    """Expect 8 of 16 tokens plus three deviations of 2, one deviation in wide rows; never more than all."""
    expected = CapacityEstimator(0, 3, ROUND)
    assert expected.capacity(0, [16, 2, 0], NARROW).to == [0, 14, 14]
    assert expected.capacity(0, [16, 2, 0], NARROW).come == [0, 2, 0]
    assert expected.capacity(0, [16, 2, 0], WIDE).to == [0, 10, 10]
    assert expected.capacity(0, [16, 2, 0], WIDE // 4).to == [0, 12, 12]


def test_what_was_seen_counts_by_layer() -> None:
    """100 tokens, all of which went to rank 1, and none came: 101 of 102 are expected, then 1 of 102."""
    expected = CapacityEstimator(0, 2, ROUND)
    expected.observe(3, [100, 100], sent=[0, 100], came=[0, 0])
    capacity = expected.capacity(3, [102, 102], NARROW)
    assert capacity.to == [0, 102]
    assert capacity.come == [0, 4]  # 1 and three deviations of 0.995
    # of a layer never seen as much is expected, after two tokens of it less
    assert expected.capacity(4, [102, 102], NARROW) == capacity
    expected.observe(4, [2, 2], sent=[0, 0], came=[0, 2])
    after = expected.capacity(4, [102, 102], NARROW)
    assert after.to[1] < 102 and after.come[1] > 50
    assert expected.capacity(3, [102, 102], NARROW) == capacity


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_steady_traffic_needs_little_more_than_it_is(share: float) -> None:
    expected, tokens = CapacityEstimator(1, 2, ROUND), 64
    rows = round(share * tokens)
    for _ in range(30):
        expected.observe(0, [tokens, tokens], sent=[rows, 0], came=[rows, 0])
    (to, _), (come, _) = (
        expected.capacity(0, [tokens, tokens], NARROW).to,
        expected.capacity(0, [tokens, tokens], NARROW).come,
    )
    assert rows <= to == come <= rows + 3 * (tokens * share * (1 - share)) ** 0.5 + 3


counts = st.integers(0, 40)


@given(
    st.integers(1, 4).flatmap(
        lambda ranks: st.lists(
            st.tuples(
                st.integers(0, 2),
                st.lists(counts, min_size=ranks, max_size=ranks),
                st.lists(st.lists(counts, min_size=ranks, max_size=ranks), min_size=ranks, max_size=ranks),
            ),
            max_size=20,
        ).map(lambda steps: (ranks, steps))
    )
)
def test_both_ends_make_the_same_room(
    drawn: tuple[int, list[tuple[int, list[int], list[list[int]]]]],
) -> None:
    """`steps`: layer, tokens of each rank, rows of each pair (cut to what there can be)."""
    ranks, steps = drawn
    expected = [CapacityEstimator(rank, ranks, ROUND) for rank in range(ranks)]
    for layer, owned, wanted in steps:
        capacities = [each.capacity(layer, owned, NARROW) for each in expected]
        for sender in range(ranks):
            assert capacities[sender].to[sender] == 0
            for receiver in range(ranks):
                assert capacities[sender].to[receiver] == capacities[receiver].come[sender]
                assert 0 <= capacities[sender].to[receiver] <= owned[sender]
        rows = [
            [min(rows, owned[sender]) if sender != to else 0 for to, rows in enumerate(wanted[sender])]
            for sender in range(ranks)
        ]
        for rank, each in enumerate(expected):
            each.observe(layer, owned, rows[rank], [of[rank] for of in rows])
