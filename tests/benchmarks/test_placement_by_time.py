"""The placement benchmark by time: groups of GRACE-MoE's idea, rows, and their tables."""

from dataclasses import asdict
from functools import partial

import numpy as np
import pytest

from benchmarks.placement import by_time, grace
from benchmarks.placement.cases import Family, cases, generated
from benchmarks.placement.time_methods import METHODS
from benchmarks.placement.time_table import FIGURES, NAMES, TimeRow, markdown, table
from exflow.placement.counts.affinity import AffinityCounts, count_affinity
from exflow.placement.plan.topology import Topology
from exflow.placement.time.sizes import UNKNOWN
from exflow.placement.traffic.step_time import StepTime
from tests.placement.planted import planted

TIME = StepTime(3238.4, 382.0, 2856.4, 0.0, 4.03, 1.195, 3.61, 7.9)


@pytest.fixture(scope="module")
def counted() -> tuple[AffinityCounts, np.ndarray]:
    """Counts of planted routing, and the planted group [L, E] of each expert."""
    trace, group = planted(tokens=2000, layers=2, experts=16, groups=4, top_k=3)
    return count_affinity(trace), group


def same(group: np.ndarray) -> np.ndarray:
    return np.asarray(group[:, None] == group)


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8, 16])
def test_groups_are_equal_and_complete(counted: tuple[AffinityCounts, np.ndarray], num_groups: int) -> None:
    for together in (counted[0].intra[0], np.zeros((16, 16), dtype=np.int64)):
        group = grace.equal_groups(together, num_groups)
        assert np.bincount(group, minlength=num_groups).tolist() == [16 // num_groups] * num_groups


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_planted_groups_are_found(counted: tuple[AffinityCounts, np.ndarray], nodes: int) -> None:
    counts, planted_group = counted
    topology = Topology(num_nodes=nodes, gpus_per_node=4 // nodes)
    for together, group in zip(counts.intra, planted_group, strict=True):
        np.testing.assert_array_equal(same(grace.rank_of_expert(together, topology)), same(group))


def test_spare_slots_hold_replicas_of_the_hottest(counted: tuple[AffinityCounts, np.ndarray]) -> None:
    counts, topology = counted[0], Topology(num_nodes=2, gpus_per_node=2)
    for slots, load in zip(grace.grouped_slots(counts, topology, 20), counts.load, strict=True):
        by_rank = slots.reshape(4, 5)
        assert all(len(set(experts)) == 5 for experts in by_rank.tolist())  # no expert twice on a GPU
        replicas = np.bincount(slots, minlength=16)
        assert replicas.min() == 1
        assert replicas[load.argmax()] > 1


def test_a_case_has_a_row_for_each_method_with_and_without_replicas() -> None:
    family = Family("tiny", partial(generated, 1000, 2, 8, 2), by_time.both_ways(4), tuple(METHODS))
    one, apart = (list(by_time.rows_of(case, UNKNOWN, 0.1)) for case in cases(family, lambda _: True))
    assert [row.method for row in one] == [*METHODS] * 2
    assert [row.redundant for row in one] == [0] * 5 + [4] * 5  # the GPUs have equally many
    assert {row.machine for row in one} == {"h200"}
    assert {row.machine for row in apart} == {"single-gpu-nodes"}
    assert one[0].ratio == apart[0].ratio == 1
    assert one[1].time
    assert one[0].time
    assert one[1].ratio == one[1].time.step_us / one[0].time.step_us


def test_tables_have_all_rows() -> None:
    rows = [
        TimeRow("some-4", "h200", "contiguous", 0, 0.5, TIME, 1.0),
        TimeRow("some-4", "h200", "time", 4, skipped="too many"),
    ]
    assert [TimeRow.of(asdict(row)) for row in rows] == rows
    head, rule, first, second = markdown(rows).splitlines()
    assert all(line.count("|") == len(NAMES + FIGURES) + 1 for line in (head, rule, first, second))
    assert first.startswith("| some-4 | h200 | contiguous | 0 | 0.5 | 3238 | 1.000 |")
    assert second.startswith("| some-4 | h200 | time | 4 | skipped: too many |")
    assert table(rows).row_count == 2
