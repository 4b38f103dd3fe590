"""Recorded routing as benchmarks use it: all tokens, or those after the prefix that sequences share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.placement import cases
from benchmarks.routing import recorded

LENGTH, PROMPT = 10, 4  # of each sequence; of what all begin with


def record(file: Path, sequences: int, **facts: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Experts [sequences, LENGTH, 3 layers, 2 choices], in a file whose sequences are 10, 11, ..."""
    experts = np.random.default_rng(sequences).integers(0, 8, (sequences, LENGTH, 3, 2)).astype(np.uint8)
    experts[:, :PROMPT] = experts[0, :PROMPT]
    sequence, position = np.repeat(np.arange(sequences), LENGTH), np.tile(np.arange(LENGTH), sequences)
    np.savez(file, experts=experts.reshape(-1, 3, 2), seq=10 + sequence, pos=position, num_experts=8, **facts)
    return experts


def test_loops_repeated_turns_and_a_common_prompt_are_left_out(tmp_path: Path) -> None:
    facts = {"group": np.repeat(np.arange(6) // 2, LENGTH), "seq_repetition": np.arange(6) == 3}
    experts = record(tmp_path / "some.npz", 6, **facts)
    kept = recorded.independent(recorded.as_recorded(tmp_path / "some.npz"))
    np.testing.assert_array_equal(kept.trace.experts, experts[[1, 5], PROMPT:].reshape(-1, 3, 2))
    assert kept.trace.sequence.tolist() == kept.unit.tolist() == [0] * 6 + [1] * 6


def test_every_fourth_group_of_all_files_is_held_out(tmp_path: Path) -> None:
    record(tmp_path / "one.npz", 6, group=np.repeat(np.arange(6) // 2, LENGTH))  # three groups
    record(tmp_path / "two.npz", 5)  # five of one sequence each
    found = recorded.joined(recorded.as_recorded(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert sorted(set(found.trace.sequence[found.held_out].tolist())) == [6, 10]
    assert found.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7]


def test_the_placement_benchmark_keeps_the_prompt_only_as_recorded(tmp_path: Path) -> None:
    files = recorded.MODELS["DeepSeek-V2-Lite"].values()
    with pytest.raises(recorded.NoTrace, match=r"esft_dsv2lite_intent\.npz: not in"):
        cases.routing(tmp_path, True, "DeepSeek-V2-Lite")
    for file in files:
        record(tmp_path / file, 8)
    whole, independent = (cases.routing(tmp_path, whole, "DeepSeek-V2-Lite") for whole in (True, False))
    assert (whole.trace.num_tokens, independent.trace.num_tokens) == (16 * LENGTH, 16 * (LENGTH - PROMPT))
