from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.counts.affinity import count_affinity
from exflow.profiling.merge import merge
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace


def make_trace(
    seed: int, sequence: list[int], *, layers: int = 2, experts: int = 4, weights: bool = False
) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, experts, (len(sequence), layers, 2))
    return RoutingTrace.from_arrays(
        chosen,
        num_experts=experts,
        sequence=sequence,
        phase=rng.choice([PREFILL, DECODE], len(sequence)),
        weights=rng.random(chosen.shape).astype(np.float16) if weights else None,
        model=f"model {seed}",
    )


def test_the_rows_are_those_of_all_traces_in_order() -> None:
    traces = [make_trace(0, [0, 1, 0]), make_trace(1, [0]), make_trace(2, [3, 3])]
    merged = merge(traces)
    for name in ("experts", "position", "phase"):
        assert np.array_equal(getattr(merged, name), np.concatenate([getattr(t, name) for t in traces]))
    assert merged.experts.dtype == traces[0].experts.dtype
    assert merged.sequence.dtype == np.int32
    assert merged.model == "model 0"
    assert merged.layout == traces[0].layout


def test_sequences_are_numbered_on() -> None:
    """Gaps stay: a sequence's number decides its home."""
    traces = [make_trace(0, [2, 0, 2]), make_trace(1, [1, 4]), make_trace(2, [0])]
    assert merge(traces).sequence.tolist() == [2, 0, 2, 4, 7, 8]


def test_of_one_trace_is_that_trace() -> None:
    trace = make_trace(0, [5, 6])
    assert merge([trace]) is trace


def test_gate_weights_are_kept_if_all_have_them() -> None:
    with_weights = [make_trace(seed, [0, 1], weights=True) for seed in (0, 1)]
    merged = merge(with_weights)
    assert merged.weights is not None
    assert with_weights[0].weights is not None
    assert np.array_equal(merged.weights[:2], with_weights[0].weights)
    assert merge([with_weights[0], make_trace(2, [0])]).weights is None
    assert merge([make_trace(2, [0]), with_weights[0]]).weights is None


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=2, max_size=4))
def test_counts_add_up_and_no_two_traces_share_a_sequence(sequences: list[list[int]]) -> None:
    traces = [make_trace(seed, sequence) for seed, sequence in enumerate(sequences)]
    merged, counts = count_affinity(merge(traces)), [count_affinity(trace) for trace in traces]
    for name in ("inter", "wrap", "intra", "load", "num_tokens"):
        assert np.array_equal(getattr(merged, name), sum(getattr(each, name) for each in counts))


def test_a_merged_trace_can_be_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    merged = merge([make_trace(0, [0, 1, 0], weights=True), make_trace(1, [1, 1], weights=True)])
    merged.save(tmp_path / "trace")
    assert RoutingTrace.load(tmp_path / "trace").digest() == merged.digest()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_trace(1, [0], experts=8), "2 MoE layers of 8 experts, top-2"),
        (make_trace(1, [0], layers=3), "3 MoE layers of 4 experts, top-2"),
        (make_trace(1, [0]).select([0]), None),
    ],
)
def test_only_traces_of_one_model_go_together(other: RoutingTrace, words: str | None) -> None:
    first = make_trace(0, [0, 1])
    if words is None:
        assert merge([first, other]).num_tokens == 3  # by another name, but alike
        return
    with pytest.raises(InputError) as error:
        merge([first, first, other])
    assert str(error.value) == (
        f"trace 1 is of 2 MoE layers of 4 experts, top-2, trace 3 of {words}; give traces of one model"
    )


def test_models_whose_layers_lie_elsewhere_are_others() -> None:
    first = make_trace(0, [0, 1])
    with pytest.raises(InputError, match="give traces of one model"):
        merge([first, replace(first, moe_layer_ids=(0, 2), num_hidden_layers=3)])
