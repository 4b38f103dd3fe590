import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from exflow.cli import app
from exflow.errors import InputError
from exflow.placement.plan import Plan
from exflow.profiling.trace import RoutingTrace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    experts = rng.choice(8, (300, 3, 1), p=np.arange(1, 9) / 36).astype(np.uint8)
    folder = tmp_path_factory.mktemp("placing") / "trace"
    RoutingTrace.from_arrays(experts, num_experts=8).save(folder)
    return folder


def exflow_place(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["place", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_max_imbalance_holds_in_the_plan(trace: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    printed = json.loads(exflow_place(trace, "--gpus", "2", "-o", plan, "--max-imbalance", "1.05", "--json"))
    assert printed["method"] == "exact, max imbalance 1.05"
    assert printed["imbalance_max"] <= 1.05
    assert Plan.load(plan).expected["imbalance"]["max"] == printed["imbalance_max"]


def test_pareto_prints_a_line_a_cap_and_writes_the_plan_asked_for(trace: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    arguments = (trace, "--gpus", "2", "--pareto", "--max-imbalance", "1.07")
    printed = json.loads(exflow_place(*arguments, "-o", plan, "--json"))
    caps = [point["max_imbalance"] for point in printed["pareto"]]
    assert caps == [1.02, 1.05, 1.07, 1.1, 1.2, 1.5, None]
    assert Plan.load(plan).method == "exact, max imbalance 1.07"
    table = exflow_place(*arguments).splitlines()
    assert [line.split()[0] for line in table] == ["cap", "1.02", "1.05", "1.07", "1.1", "1.2", "1.5", "free"]


def test_a_plan_that_cannot_be_is_not_written(trace: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    with pytest.raises(InputError, match=r"plan\.json is not written: max imbalance 1 cannot be kept"):
        exflow_place(trace, "--gpus", "4", "--pareto", "--max-imbalance", "1", "-o", plan)
    with pytest.raises(InputError, match="max imbalance 1 cannot be kept"):
        exflow_place(trace, "--gpus", "4", "--max-imbalance", "1", "-o", plan)
    assert not plan.exists()


def test_a_plan_needs_a_file(trace: Path) -> None:
    with pytest.raises(InputError, match="--output is missing"):
        exflow_place(trace, "--gpus", "2")
