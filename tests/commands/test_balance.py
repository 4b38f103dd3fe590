"""`exflow balance`: loads as engines count them, and a plan that levels them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exflow.commands.balance import plan_of_loads
from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.importers.loads import read_loads

LOADS = np.array([[0, 0, 0, 0], [8, 1, 1, 6], [3, 3, 3, 3]])  # the first layer is dense


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Callable[[str], tuple[int, str, str]]
) -> Callable[[str], str]:
    """run("loads.json --gpus 2 ..."): what `exflow balance` printed on stdout, or the error."""
    monkeypatch.chdir(tmp_path)

    def balance(line: str) -> str:
        code, out, err = command_line(f"balance {line}")
        return err if code else out

    return balance


def stat_file(path: Path) -> None:
    """Write counts as SGLang's recorder does: int32 [steps, layers, experts]."""
    steps = torch.tensor(np.stack([LOADS, LOADS]), dtype=torch.int32)
    torch.save({"rank": 0, "logical_count": steps, "average_utilization_rate_over_window": None}, path)


def test_every_form_of_the_file(tmp_path: Path) -> None:
    stat_file(tmp_path / "stat.pt")
    (tmp_path / "table.json").write_text(json.dumps(LOADS.tolist()))
    (tmp_path / "object.json").write_text(json.dumps({"logical_count": [LOADS.tolist()] * 3}))
    assert read_loads(tmp_path / "stat.pt").tolist() == (2 * LOADS).tolist()
    assert read_loads(tmp_path / "table.json").tolist() == LOADS.tolist()
    assert read_loads(tmp_path / "object.json").tolist() == (3 * LOADS).tolist()


def test_the_command_writes_a_plan_that_levels_them(tmp_path: Path, run: Callable[[str], str]) -> None:
    stat_file(tmp_path / "stat.pt")
    shown = json.loads(run("stat.pt --gpus 2 -o plan.json --model mine --json"))
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.model, plan.moe_layer_ids, plan.num_hidden_layers) == ("mine", (1, 2), 3)
    assert plan.physical_to_logical_map[0].reshape(2, 2).tolist() == [[0, 2], [1, 3]]  # 9 and 7
    assert shown["imbalance_mean"] == pytest.approx((9 / 8 + 1) / 2)
    assert shown["imbalance_max"] == pytest.approx(9 / 8)
    replicated = json.loads(run("stat.pt stat.pt --gpus 2 --redundant-experts 2 -o plan.json --json"))
    assert replicated["slots"] == 6 and replicated["imbalance_max"] < 9 / 8


@settings(deadline=None)
@given(arrays(np.int64, (3, 6), elements=st.integers(0, 50)), st.sampled_from([1, 2, 3]), st.integers(0, 4))
def test_every_expert_is_placed_where_there_is_load(load: np.ndarray, ranks: int, redundant: int) -> None:
    topology = Topology(gpus_per_node=ranks)
    if not load.any():
        with pytest.raises(InputError, match="all zero"):
            plan_of_loads(load, topology, redundant, "")
        return
    plan, busiest = plan_of_loads(load, topology, redundant, "")
    assert plan.moe_layer_ids == tuple(np.flatnonzero(load.any(axis=1)))
    assert plan.num_slots >= 6 + redundant
    assert (busiest + 1e-9 >= 1).all() and (busiest <= ranks + 1e-9).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[[1, 2], [3]]", "f.json: cannot be read"),
        (b"{}", "f.json: (cannot be read|holds no table)"),
        (b"[1, 2]", "f.json: holds no table of layers and experts"),
        (b"[[1, -2]]", "f.json: holds counts that are negative"),
        (b"[[1, NaN]]", "f.json: holds counts that are negative or not finite"),
        (b"[[1, 2]", "f.json: cannot be read"),
        (b"\x80\x04cos\nsystem\n", "f.json: cannot be read"),
        (b"PK\x03\x04 and no archive", "f.json: cannot be read"),
    ],
)
def test_what_is_no_table_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_loads(tmp_path / "f.json")


def test_files_of_two_models_are_told_apart(tmp_path: Path, run: Callable[[str], str]) -> None:
    (tmp_path / "a.json").write_text("[[1, 2]]")
    (tmp_path / "b.json").write_text("[[1, 2, 3]]")
    told = "exflow: b.json: counts 1 layers of 3 experts, a.json 1 of 2; give files of one model\n"
    assert run("a.json b.json --gpus 1 -o plan.json") == told
