"""RoutingTrace in memory, and its round trip through a folder."""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    tokens, layers, top_k = draw(st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3)))
    num_experts = draw(st.sampled_from([1, 8, 256, 257, 65536]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (tokens, layers, top_k)
    counts = rng.integers(1, num_experts, layers, endpoint=True) if draw(st.booleans()) else None
    if counts is not None:
        counts[rng.integers(layers)] = num_experts
    return RoutingTrace.from_arrays(
        rng.integers(0, num_experts if counts is None else counts[:, np.newaxis], shape),
        num_experts=num_experts,
        experts_per_layer=None if counts is None else counts.tolist(),
        sequence=rng.integers(0, 5, tokens),
        phase=rng.integers(0, 2, tokens),
        weights=rng.random(shape) if draw(st.booleans()) else None,
        model=draw(st.text(max_size=5)),
        moe_layer_ids=range(1, layers + 1),
        num_hidden_layers=layers + 2,
    )


@settings(max_examples=40, deadline=None)
@given(trace=traces(), shard_tokens=st.integers(1, 50))
def test_a_saved_trace_loads_the_same(trace: RoutingTrace, shard_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trace.save(folder, shard_tokens=shard_tokens)
        loaded = RoutingTrace.load(folder)
        for name in ("experts", "sequence", "position", "phase", "weights"):
            before, after = getattr(trace, name), getattr(loaded, name)
            np.testing.assert_array_equal(after, before)
            assert before is None or after.dtype == before.dtype
        assert loaded.layout == trace.layout
        assert loaded.experts_per_layer == trace.experts_per_layer
        assert loaded.digest() == trace.digest()


def test_a_trace_of_one_shard_is_mapped_not_read(tmp_path: Path) -> None:
    RoutingTrace.from_arrays(np.zeros((10, 2, 1), int), num_experts=2, weights=np.zeros((10, 2, 1))).save(
        tmp_path / "t"
    )
    loaded = RoutingTrace.load(tmp_path / "t")
    for array in (loaded.experts, loaded.sequence, loaded.position, loaded.phase, loaded.weights):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


def test_many_shards_beyond_what_memory_is_for_are_joined_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    experts, weights = rng.integers(0, 300, (50, 3, 2)), rng.random((50, 3, 2))
    trace = RoutingTrace.from_arrays(experts, num_experts=300, sequence=np.arange(50) // 7, weights=weights)
    trace.save(tmp_path / "t", shard_tokens=8)
    assert not isinstance(RoutingTrace.load(tmp_path / "t").experts, np.memmap)
    monkeypatch.setattr("exflow.profiling.trace.MOST_IN_MEMORY", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = RoutingTrace.load(tmp_path / "t")
    for array in (loaded.experts, loaded.sequence, loaded.position, loaded.phase, loaded.weights):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    assert loaded.digest() == trace.digest()
    assert loaded.of_phase("all") is loaded
    assert [path.name for path in tmp_path.iterdir()] == ["t"]  # the file has no name
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere: the trace's 0 MiB cannot be joined there .* set TMPDIR"):
        RoutingTrace.load(tmp_path / "t")


def test_defaults_of_from_arrays() -> None:
    trace = RoutingTrace.from_arrays([[1, 0], [2, 0], [0, 1]], num_experts=3, sequence=[4, 9, 4])
    assert trace.experts.shape == (3, 2, 1)
    assert (trace.num_tokens, trace.num_layers, trace.top_k) == (3, 2, 1)
    assert trace.position.tolist() == [0, 0, 1]
    assert trace.phase.tolist() == [DECODE] * 3
    assert (trace.moe_layer_ids, trace.num_hidden_layers) == ((0, 1), 2)
    dtypes = (trace.experts.dtype, trace.sequence.dtype, trace.position.dtype, trace.phase.dtype)
    assert dtypes == (np.uint8, np.int32, np.int32, np.uint8)


def test_layers_may_have_different_numbers_of_experts(tmp_path: Path) -> None:
    ids = [[[3], [1], [2]], [[0], [0], [3]], [[2], [1], [0]]]
    trace = RoutingTrace.from_arrays(ids, num_experts=4, experts_per_layer=[4, 2, 4])
    assert trace.experts_per_layer == (4, 2, 4) == trace.layout.experts_per_layer
    assert trace.select([0, 2]).experts_per_layer == (4, 2, 4)
    assert replace(trace, model="n").experts_per_layer == (4, 2, 4)
    trace.save(tmp_path / "t")
    assert RoutingTrace.load(tmp_path / "t").experts_per_layer == (4, 2, 4)


def test_layers_that_are_alike_are_the_same_trace_whether_that_is_said_or_not(tmp_path: Path) -> None:
    unsaid = RoutingTrace.from_arrays(IDS, num_experts=4)
    said = RoutingTrace.from_arrays(IDS, num_experts=4, experts_per_layer=(4, 4))
    assert said.experts_per_layer == unsaid.experts_per_layer == (4, 4)
    assert said.layout == unsaid.layout
    assert said.layout.expert_counts == (4, 4)
    assert said.digest() == unsaid.digest()
    said.save(tmp_path / "t")
    assert "experts_per_layer" not in (tmp_path / "t/index.json").read_text(encoding="utf-8")


def test_a_trace_built_by_its_plain_constructor_is_checked_when_it_is_saved(tmp_path: Path) -> None:
    trace = RoutingTrace.from_arrays(IDS + 3, num_experts=4)
    with pytest.raises(InputError, match="t: experts: holds 3 in MoE layer 1; values there must be from 0"):
        replace(trace, experts_per_layer=(4, 3)).save(tmp_path / "t")


def test_ids_take_one_byte_up_to_256_experts() -> None:
    assert RoutingTrace.from_arrays([[255]], num_experts=256).experts.dtype == np.uint8
    assert RoutingTrace.from_arrays([[256]], num_experts=257).experts.dtype == np.uint16


IDS = np.zeros((3, 2, 1), int)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": IDS + 4}, "experts: holds 4; values must be from 0 to 3"),
        ({"experts": IDS - 1}, "experts: holds -1; values must be from 0 to 3"),
        ({"experts": IDS * 1.0}, "experts: dtype is float64; give integers"),
        ({"experts": IDS == 0}, "experts: dtype is bool; give integers"),
        ({"experts": IDS[0, 0]}, r"experts: shape is \(1,\); give \[tokens, layers, top_k\]"),
        ({"experts": IDS[:, :0]}, r"experts: shape is \(3, 0, 1\)"),
        ({"sequence": [0, 0]}, r"sequence: shape is \(2,\); \(3,\) is needed to match experts"),
        ({"sequence": [0, 0, 2**31]}, "sequence: holds 2147483648; values must be from 0 to 2147483647"),
        ({"sequence": [0, 0, -1]}, "sequence: holds -1"),
        ({"position": [0, 2, 1]}, "position: the rows of sequence 0 are not in order of position; sort them"),
        ({"phase": [0, 1, 2]}, "phase: holds 2; values must be from 0 to 1"),
        ({"weights": IDS}, "weights: dtype is int64; give floating-point numbers"),
        ({"weights": np.ones((3, 2, 2))}, r"weights: shape is \(3, 2, 2\); \(3, 2, 1\) is needed"),
        ({"num_experts": 0}, "num_experts: is 0; give a number from 1 to 65536"),
        ({"num_experts": 65537}, "num_experts: is 65537"),
        ({"moe_layer_ids": [0]}, "moe_layer_ids: has 1 entries for 2 layers; give one each"),
        ({"moe_layer_ids": [1, 0]}, r"moe_layer_ids: are \[1, 0\]; give ascending"),
        ({"num_hidden_layers": 1}, "moe_layer_ids: layer 1 is not among 1 hidden layers; give indices below"),
        (
            {"experts_per_layer": [4]},
            "experts_per_layer: has 1 entries for 2 MoE layers; give one each",
        ),
        (
            {"experts_per_layer": [4, 5]},
            "experts_per_layer: is 5 in MoE layer 1; give a number from 1 to num_experts, which is 4",
        ),
        ({"experts_per_layer": [0, 4]}, "experts_per_layer: is 0 in MoE layer 0; give a number from 1"),
        (
            {"experts_per_layer": [2, 3]},
            "num_experts: is 4, but no layer has more than 3 in experts_per_layer; give 3",
        ),
        (
            {"experts": IDS + np.array([[0], [2]]), "experts_per_layer": [4, 2]},
            "experts: holds 2 in MoE layer 1; values there must be from 0 to 1",
        ),
        (
            {"experts": IDS + np.array([[4], [0]]), "experts_per_layer": [4, 2]},
            "experts: holds 4; values must be from 0 to 3",
        ),
        ({"experts": IDS - 1, "experts_per_layer": [4, 2]}, "experts: holds -1; values must be"),
    ],
)
def test_from_arrays_names_what_does_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoutingTrace.from_arrays(**{"experts": IDS, "num_experts": 4} | fields)


def test_select_by_mask_and_by_indices(tmp_path: Path) -> None:
    trace = RoutingTrace.from_arrays(
        [[0], [1], [2], [3]], num_experts=4, sequence=[0, 1, 0, 1], phase=[PREFILL, DECODE, DECODE, DECODE]
    )
    trace.save(tmp_path / "t")
    for source in (trace, RoutingTrace.load(tmp_path / "t")):
        chosen = source.select(source.sequence == 1)
        assert chosen.experts.ravel().tolist() == [1, 3]
        assert chosen.position.tolist() == [0, 1]
        assert chosen.digest() == source.select([1, 3]).digest()
    with pytest.raises(InputError, match="select: the rows of sequence 1 are not in order"):
        trace.select([3, 1])


def test_the_digest_depends_on_every_part() -> None:
    fields: dict[str, Any] = {
        "experts": IDS,
        "num_experts": 4,
        "sequence": [0, 0, 0],
        "position": [0, 1, 2],
        "phase": [0, 0, 0],
        "model": "m",
        "moe_layer_ids": (0, 1),
        "num_hidden_layers": 4,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"experts": IDS + 1},
        {"num_experts": 5},
        {"sequence": [0, 0, 1]},
        {"position": [0, 1, 3]},
        {"phase": [0, 0, 1]},
        {"weights": IDS * 1.0},
        {"model": "n"},
        {"moe_layer_ids": (0, 2)},
        {"num_hidden_layers": 5},
        {"experts_per_layer": (4, 3)},
        {"experts_per_layer": (3, 4)},
    ]
    digests = {RoutingTrace.from_arrays(**fields | change).digest() for change in changes}
    assert len(digests) == len(changes)


def test_an_empty_trace_is_not_saved(tmp_path: Path) -> None:
    empty = RoutingTrace.from_arrays(IDS, num_experts=4, experts_per_layer=(4, 2)).select([False] * 3)
    assert empty.num_tokens == 0
    again = RoutingTrace.from_arrays(empty.experts, num_experts=4, experts_per_layer=(4, 2))
    assert (
        again.digest() == RoutingTrace.from_arrays(IDS[:0], num_experts=4, experts_per_layer=(4, 2)).digest()
    )
    with pytest.raises(InputError, match="the trace to save holds no tokens; select at least one"):
        empty.save(tmp_path / "t")


def test_reading_traces_does_not_load_torch() -> None:
    modules = "sys, exflow.profiling.trace, exflow.profiling.importers.registry"
    code = f"import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
