from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.counts.affinity import AffinityCounts, count_affinity
from exflow.profiling.sequences import consecutive_rows
from exflow.profiling.trace import RoutingTrace


def slow_count(trace: RoutingTrace) -> AffinityCounts:
    """The definitions, word by word."""
    num_layers, num_experts = trace.num_layers, trace.num_experts
    inter = np.zeros((num_layers - 1, num_experts, num_experts), dtype=np.int64)
    wrap = np.zeros((num_experts, num_experts), dtype=np.int64)
    intra = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
    load = np.zeros((num_layers, num_experts), dtype=np.int64)
    tokens = trace.experts.tolist()
    for token in tokens:
        for layer, chosen in enumerate(token):
            for e in chosen:
                load[layer, e] += 1
            for e in set(chosen):
                for f in set(chosen) - {e}:
                    intra[layer, e, f] += 1
        for layer, (here, there) in enumerate(pairwise(token)):
            for e in here:
                for f in there:
                    inter[layer, e, f] += 1
    for sequence in set(trace.sequence.tolist()):
        rows = [token for token, of in zip(tokens, trace.sequence, strict=True) if of == sequence]
        for token, following in pairwise(rows):
            for e in token[-1]:
                for f in following[0]:
                    wrap[e, f] += 1
    return AffinityCounts(inter, wrap, intra, load, trace.num_tokens, trace.top_k)


def assert_same(counts: AffinityCounts, wanted: AffinityCounts) -> None:
    for name in ("inter", "wrap", "intra", "load"):
        found = getattr(counts, name)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, getattr(wanted, name), err_msg=name)
    assert (counts.num_tokens, counts.top_k) == (wanted.num_tokens, wanted.top_k)


def test_two_tokens_that_follow_each_other() -> None:
    counts = count_affinity(RoutingTrace.from_arrays([[0, 1], [0, 2]], num_experts=3))
    assert counts.inter.tolist() == [[[0, 1, 1], [0, 0, 0], [0, 0, 0]]]
    assert counts.wrap.tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 0, 0],
    ]  # expert 1, then the next token's expert 0
    assert counts.load.tolist() == [[2, 0, 0], [0, 1, 1]]
    assert not counts.intra.any()


def test_a_token_that_names_an_expert_twice_selects_the_pair_once() -> None:
    counts = count_affinity(RoutingTrace.from_arrays([[[1, 0, 1]]], num_experts=2))
    assert counts.intra.tolist() == [[[0, 1], [1, 0]]]
    assert counts.load.tolist() == [[1, 2]]


def test_rows_of_interleaved_sequences_follow_their_own() -> None:
    row, next_row = consecutive_rows(np.array([5, 3, 5, 3, 5, 8]))
    assert sorted(zip(row.tolist(), next_row.tolist(), strict=True)) == [(0, 2), (1, 3), (2, 4)]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([1, 2, 5, 300]),
    st.integers(0, 2**32 - 1),
)
def test_counts_are_their_definition(tokens: int, layers: int, top_k: int, experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, experts, (tokens, layers, top_k)) // rng.integers(1, 100)  # at times few, repeated
    trace = RoutingTrace.from_arrays(ids, num_experts=experts, sequence=rng.integers(0, 3, tokens))
    counts = count_affinity(trace)
    assert_same(counts, slow_count(trace))
    assert (counts.inter.sum(axis=(1, 2)) == tokens * top_k**2).all()
    assert (counts.load.sum(axis=1) == tokens * top_k).all()
    np.testing.assert_array_equal(counts.intra, counts.intra.transpose(0, 2, 1))


@pytest.mark.parametrize("num_experts", [256, 257])  # the last with 8 bits, the first with 16
def test_a_memory_mapped_trace_counts_the_same(tmp_path: Path, num_experts: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, num_experts, (5000, 2, 2))  # more than one chunk
    trace = RoutingTrace.from_arrays(ids, num_experts=num_experts, sequence=rng.integers(0, 9, 5000))
    trace.save(tmp_path / "trace")
    mapped = RoutingTrace.load(tmp_path / "trace")
    assert isinstance(mapped.experts, np.memmap)
    assert_same(count_affinity(mapped), slow_count(trace))
