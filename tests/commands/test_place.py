"""Effect of the options of `exflow place`, in JSON and in tables."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from exflow.cli import app
from exflow.errors import InputError
from exflow.placement.pareto import PRICES
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.plan.topology_file import load_topology
from exflow.placement.robust import messages
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.merge import merge
from exflow.profiling.trace import RoutingTrace

FIGURES = {
    "plan",
    "strategy",
    "method",
    "slots",
    "objective",
    "lower_bound",
    "gap",
    "optimal",
    "messages_dispatch_combine",
    "messages_coherent",
    "local_fraction",
    "imbalance_mean",
    "imbalance_max",
    "notes",
}

MESSAGES = ("--objective", "messages")


def save_trace(folder: Path, seed: int, tokens: int = 300) -> Path:
    """Tokens of a sequence keep to four experts of eight, mostly; two of 3 layers' experts are hot."""
    rng = np.random.default_rng(seed)
    sequence = np.arange(tokens) // 10
    half = np.argsort(np.random.default_rng([seed, 1]).random((3, 8)), axis=1).reshape(3, 2, 4)
    side = rng.integers(0, 2, sequence[-1] + 1)[sequence]
    place = rng.choice(4, (tokens, 3), p=[0.4, 0.3, 0.2, 0.1])
    experts = half[np.arange(3), side[:, None], place]
    RoutingTrace.from_arrays(experts, num_experts=8, sequence=sequence, model="small").save(folder)
    return folder


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trace(tmp_path_factory.mktemp("placing") / "trace", 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second trace of the same model, in which other experts go together."""
    return save_trace(tmp_path_factory.mktemp("placing") / "other", 1, tokens=100)


def exflow_place(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["place", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def placed(plan: Path, *arguments: str | Path) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what is said of it as JSON: numbers that are none are not JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    shown = exflow_place(*arguments, "-o", plan, "--json")
    return Plan.load(plan), json.loads(shown, parse_constant=refuse)


def moves(plan: Plan, before: Plan) -> int:
    return int((plan.hosts & ~before.hosts).sum())


def test_the_figures_are_those_of_the_plan(trace: Path, tmp_path: Path) -> None:
    plan, shown = placed(tmp_path / "plan.json", trace, "--gpus", "2", *MESSAGES)
    assert set(shown) == FIGURES
    assert shown["plan"] == str(tmp_path / "plan.json")
    assert (shown["method"], shown["optimal"], shown["gap"]) == ("exact", True, 0)
    assert shown["strategy"] == "coherent"
    assert (shown["objective"], shown["lower_bound"]) == (plan.objective, plan.lower_bound)
    assert plan.expected == evaluate(plan, RoutingTrace.load(trace))
    coherent = plan.expected["strategies"]["coherent"]
    assert shown["messages_coherent"] == coherent["messages_per_token_layer"]
    assert shown["imbalance_max"] == plan.expected["imbalance"]["max"]
    lines = exflow_place(trace, "--gpus", "2", "-o", tmp_path / "plan.json", *MESSAGES).splitlines()
    assert len(lines) == len(FIGURES) - 1  # notes are on stderr
    assert [line.split()[0] for line in lines[:4]] == ["plan", "strategy", "method", "slots"]


def test_max_imbalance_holds_in_the_plan(trace: Path, tmp_path: Path) -> None:
    plan, shown = placed(tmp_path / "plan.json", trace, "--gpus", "2", "--max-imbalance", "1.05")
    assert shown["method"] == "exact"
    assert shown["imbalance_max"] <= 1.05
    assert plan.expected["imbalance"]["max"] == shown["imbalance_max"]


@pytest.mark.parametrize("extra", [(), ("--pareto",), ("--learning-curve",)])
def test_a_plan_that_cannot_be_is_not_written(trace: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    plan = tmp_path / "plan.json"
    with pytest.raises(InputError, match="max imbalance 1 cannot be kept"):
        exflow_place(trace, "--gpus", "4", "--max-imbalance", "1", "-o", plan, *extra)
    assert not plan.exists()


def test_a_plan_needs_a_file_unless_a_table_is_wanted(trace: Path) -> None:
    with pytest.raises(InputError, match="--output is missing"):
        exflow_place(trace, "--gpus", "2")
    assert exflow_place(trace, "--gpus", "2", "--pareto").startswith("price")
    assert exflow_place(trace, "--gpus", "2", "--learning-curve").startswith("tokens")


# Where experts can live.


def test_topology_is_what_the_file_says(trace: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "nodes: 2\ngpus_per_node: 2\nintra_node: {latency_us: 2, bandwidth_gb_s: 400}\n"
        "inter_node: {latency_us: 9, bandwidth_gb_s: 25}\n"
    )
    plan, shown = placed(tmp_path / "plan.json", trace, "--topology", cluster)
    assert plan.topology == load_topology(cluster)
    assert plan.topology.link_cost is not None
    assert "messages_node_coherent" in shown


def test_nodes_are_equal(trace: Path, tmp_path: Path) -> None:
    plan, shown = placed(tmp_path / "plan.json", trace, "--gpus", "4", "--nodes", "2", *MESSAGES)
    assert plan.topology == Topology(num_nodes=2, gpus_per_node=2)
    assert set(shown) == FIGURES | {"messages_node_coherent"}


def test_redundant_experts_get_slots(trace: Path, tmp_path: Path) -> None:
    plan, shown = placed(tmp_path / "plan.json", trace, "--gpus", "4", "--redundant-experts", "2")
    assert shown["slots"] == plan.num_slots == 12
    assert (plan.hosts.sum(axis=(1, 2)) == 12).all()


def test_experts_that_the_gpus_cannot_share_get_a_replica(trace: Path, tmp_path: Path) -> None:
    _, shown = placed(tmp_path / "plan.json", trace, "--gpus", "3")
    assert shown["slots"] == 9


def test_what_fits_into_the_memory_is_placed(trace: Path, tmp_path: Path) -> None:
    """4 experts of 3 layers, 256 MiB each: 3 GiB."""
    plan = tmp_path / "plan.json"
    sized = (trace, "--gpus", "2", "--expert-size", "256", "--gpu-memory")
    placed(plan, *sized, "3")
    plan.unlink()
    with pytest.raises(InputError, match=r"--gpu-memory 2.9: 4 experts .* 3 layers take 3.0 GiB a GPU"):
        exflow_place(*sized, "2.9", "-o", plan)
    assert not plan.exists()


# What is good.


@pytest.mark.parametrize("strategy", ["coherent", "node-coherent", "dispatch-combine"])
def test_the_plan_says_what_it_was_made_for(trace: Path, tmp_path: Path, strategy: str) -> None:
    where = ("--gpus", "4", "--nodes", "2")
    plan, shown = placed(tmp_path / "plan.json", trace, *where, "--strategy", strategy)
    assert plan.strategy == shown["strategy"] == strategy
    assert plan.expected["imbalance"] == plan.expected["strategies"][strategy.replace("-", "_")]["imbalance"]


def test_a_high_price_buys_balance(trace: Path, tmp_path: Path) -> None:
    where = (trace, "--gpus", "4", "--method", "search")
    _, cheap = placed(tmp_path / "cheap.json", *where, "--balance-price", "0")
    _, dear = placed(tmp_path / "dear.json", *where, "--balance-price", "50")
    assert dear["imbalance_mean"] < cheap["imbalance_mean"]
    assert cheap["messages_coherent"] < dear["messages_coherent"]


def test_weights_and_the_worst_case(trace: Path, other: Path, tmp_path: Path) -> None:
    both = (trace, other, "--gpus", "2", *MESSAGES)
    loaded = [RoutingTrace.load(path) for path in (trace, other)]

    def by_trace(*options: str) -> list[float]:
        plan, shown = placed(tmp_path / "plan.json", *both, *options)
        figures = shown["messages_by_trace"]
        assert set(shown) == FIGURES | {"messages_by_trace"}
        assert figures == {str(trace): messages(plan, loaded[0]), str(other): messages(plan, loaded[1])}
        assert plan.trace_digest == merge(loaded).digest()
        return list(figures.values())

    merged = by_trace()
    first, second = (
        by_trace("--weight", "1000", "--weight", "1"),
        by_trace("--weight", "1", "--weight", "1000"),
    )
    worst = by_trace("--worst-case")
    assert first[0] < second[0]
    assert second[1] < first[1]
    assert max(worst) <= min(max(merged), max(first), max(second))
    assert str(other) in exflow_place(*both, "-o", tmp_path / "plan.json")


def test_from_a_plan_only_so_many_move(trace: Path, other: Path, tmp_path: Path) -> None:
    before, _ = placed(tmp_path / "before.json", trace, "--gpus", "4")
    sent = []
    for most in (0, 2, 4, 100):
        options = ("--from", tmp_path / "before.json", "--max-moves", str(most))
        plan, shown = placed(tmp_path / "next.json", other, "--gpus", "4", *options)
        assert moves(plan, before) <= most
        sent.append(shown["messages_coherent"])
    assert np.array_equal(before.hosts, Plan.load(tmp_path / "before.json").hosts)
    assert sent[-1] < sent[0]


# How far to trust it.


def test_pareto_prints_a_line_a_price_and_writes_the_plan_asked_for(trace: Path, tmp_path: Path) -> None:
    arguments = (trace, "--gpus", "2", "--pareto", "--balance-price", "0.7")
    plan, shown = placed(tmp_path / "plan.json", *arguments)
    prices = [point["balance_price"] for point in shown["pareto"]]
    assert prices == sorted({*PRICES, 0.7})
    (ours,) = [point for point in shown["pareto"] if point["balance_price"] == 0.7]
    assert ours["messages_per_token_layer"] == shown["messages_coherent"]
    assert ours["imbalance_max"] == shown["imbalance_max"] == plan.expected["imbalance"]["max"]
    table = exflow_place(*arguments).splitlines()
    assert table[0].split() == ["price", "messages", "imbalance", "worst", "layer"]
    assert [float(line.split()[0]) for line in table[1:]] == prices


def test_held_out_figures_are_of_tokens_that_the_plan_has_not_seen(trace: Path, tmp_path: Path) -> None:
    plan, shown = placed(tmp_path / "plan.json", trace, "--gpus", "2", "--holdout", "0.2", *MESSAGES)
    assert shown["held_out_sequences"] == 6
    assert shown["held_out_tokens"] == 60
    assert plan.expected["tokens"] == 240
    figure = shown["held_out_messages_per_token_layer"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert shown["held_out_ratio_to_contiguous"]["value"] < 1
    held_out = {f"held_out_{name}": value for name, value in plan.expected["held_out"].items()}
    assert {name: value for name, value in shown.items() if name not in FIGURES} == held_out
    assert " to " in exflow_place(trace, "--gpus", "2", "--holdout", "0.2", "-o", tmp_path / "plan.json")


def test_the_learning_curve_ends_in_a_verdict(trace: Path, other: Path, tmp_path: Path) -> None:
    arguments = (trace, other, "--gpus", "2", "--learning-curve")
    _, shown = placed(tmp_path / "plan.json", *arguments)
    assert set(shown) == FIGURES | {"learning_curve", "verdict", "messages_by_trace"}
    tokens = [point["tokens"] for point in shown["learning_curve"]]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 300  # three quarters of 400
    for point in shown["learning_curve"]:
        assert set(point) == {"tokens", "sequences", "on_its_own", "held_out", "low", "high"}
    assert shown["verdict"].startswith(("Enough tokens were profiled: ", "More tokens may help: "))
    assert exflow_place(*arguments).splitlines()[-1] == shown["verdict"]


def test_everything_at_once(trace: Path, other: Path, tmp_path: Path) -> None:
    options = ("--gpus", "4", "--nodes", "2", "--redundant-experts", "4", "--strategy", "node-coherent")
    tables = ("--pareto", "--learning-curve", "--holdout", "0.3", "--time-limit", "1")
    plan, shown = placed(tmp_path / "plan.json", trace, other, *options, *tables)
    assert {"pareto", "learning_curve", "verdict", "messages_by_trace", "held_out_inter_node"} <= set(shown)
    assert (plan.num_slots, plan.strategy) == (12, "node-coherent")


def test_help_shows_the_panels() -> None:
    shown = exflow_place("--help")
    panels = ("GPUs and slots", "Goal", "Search", "Judge the result", "For experts")
    places = [shown.index(panel) for panel in panels]
    assert places == sorted(places)
    assert shown.index("--redundant-experts") < places[1] < shown.index("--worst-case") < places[2]
    assert shown.index("--method") > places[-1]


# Ctrl-C.

_INTERRUPTED = """
import os, signal, sys, time
from exflow.cli import main, place

class Line(place.TimedWork):
    told = None
    def tell(self, detail):
        if Line.told is None and detail.startswith("objective"):
            Line.told = time.monotonic()
            os.killpg(0, signal.SIGINT)

place.TimedWork = Line
try:
    main()
finally:
    with open(os.environ["SECONDS"], "w") as file:
        file.write(str(time.monotonic() - Line.told))
"""


@dataclass
class Interrupted:
    code: int
    stdout: str
    stderr: str
    seconds: float  # from Ctrl-C to the end
    folder: Path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A search that has its first result and seconds to go, over an older plan, when Ctrl-C comes."""
    folder = tmp_path_factory.mktemp("interrupted")
    experts = np.random.default_rng(0).integers(0, 64, (500, 24, 2))
    RoutingTrace.from_arrays(experts, num_experts=64).save(folder / "trace")
    (folder / "plan.json").write_text("an older plan")
    arguments = ["place", "trace", "--gpus", "8", "-o", "plan.json", "--time-limit", "4", *MESSAGES]
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, *arguments],
        cwd=folder,
        env=os.environ | {"SECONDS": str(folder / "seconds")},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
    )
    seconds = float((folder / "seconds").read_text())
    return Interrupted(done.returncode, done.stdout, done.stderr, seconds, folder)


@pytest.mark.slow
def test_ctrl_c_writes_the_best_so_far(interrupted: Interrupted) -> None:
    assert interrupted.code == 0
    assert "messages coherent" in interrupted.stdout
    assert (
        interrupted.stderr.startswith("exflow: The trace has 500 tokens")
        and interrupted.stderr.count("\n") == 1
    )
    assert Plan.load(interrupted.folder / "plan.json").num_ranks == 8
    assert {path.name for path in interrupted.folder.iterdir()} == {"plan.json", "seconds", "trace"}


@pytest.mark.slow
def test_ctrl_c_ends_the_search_soon(interrupted: Interrupted) -> None:
    assert interrupted.seconds < 1
