"""Simulated clusters: sizes by hand, laws that every machine obeys, the cost model where they overlap."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import exflow.cost.batches
from exflow.cost import machines as times
from exflow.cost.auto import predictions
from exflow.cost.batches import DrawnBatches
from exflow.cost.crossover import crossovers, quantities
from exflow.cost.simulate import (
    Layout,
    Point,
    Variant,
    split_sequences,
    step,
    strategies_on,
    variants,
)
from exflow.cost.workload import Workload
from exflow.model.config import ModelConfig
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.placement.time.machine import Link, Machine
from exflow.placement.time.machines import load_machine
from exflow.placement.time.serving import Serving
from exflow.placement.traffic.evaluate import evaluate
from exflow.placement.traffic.step_time import step_time
from exflow.profiling.trace import RoutingTrace

NODES = Topology(num_nodes=2, gpus_per_node=2)
MACHINES = Path(__file__).parents[2] / "configs" / "machines"
MODEL = ModelConfig(
    name="small",
    vocab_size=280,
    max_positions=64,
    num_hidden_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_kv_heads=2,
    intermediate_size=16,
    num_experts=8,
    top_k=2,
)


def skewed(tokens: int = 240, top_k: int = 2) -> RoutingTrace:
    """Some experts are more popular, and tokens come back to experts they know."""
    draw = np.random.default_rng(3).random((tokens, 3, 8)) + 0.3 * np.arange(8) / 8
    experts = draw.argpartition(8 - top_k, axis=2)[:, :, 8 - top_k :]
    return RoutingTrace.from_arrays(
        experts, num_experts=8, sequence=np.arange(tokens) // 20, model="small", num_hidden_layers=3
    )


@pytest.fixture(scope="module")
def choice() -> list[Variant]:
    trace = skewed()
    return variants(trace, trace, NODES, 2.0, lambda what: None)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 64), st.none() | st.integers(1, 64))
def test_groups_are_even(gpus: int, gpus_per_node: int, experts: int, widest: int | None) -> None:
    layout = Layout.of(gpus, gpus_per_node, experts, widest)
    width, topology = layout.width, layout.topology
    assert gpus == layout.copies * width and experts % width == 0 and width <= (widest or width)
    assert topology.num_ranks == width and topology.gpus_per_node <= gpus_per_node
    assert width <= gpus_per_node or topology.gpus_per_node == gpus_per_node


def test_more_gpus_than_experts_are_copies() -> None:
    layout = Layout.of(1024, 8, 256)
    assert (layout.width, layout.copies) == (256, 4)
    assert layout.topology == Topology(num_nodes=32, gpus_per_node=8)
    assert Layout.of(1024, 8, 256, widest=32).copies == 32
    assert Layout.of(12, 8, 32).width == 4  # 8 do not divide 12


def test_a_split_trace_is_the_same_rows_in_short_sequences() -> None:
    trace = skewed()
    split = split_sequences(trace, 4)
    assert np.array_equal(split.experts, trace.experts)
    assert len(set(split.sequence.tolist())) >= 4 * 4
    assert len(set(split_sequences(trace, 1000).sequence.tolist())) == trace.num_tokens


@pytest.mark.parametrize("strategy", [Strategy.DISPATCH_COMBINE, Strategy.COHERENT, Strategy.REPLICATED])
@pytest.mark.parametrize(("size", "near"), [(1, 1e-9), (64, 1e-9), (3, 0.03), (20, 0.03), (48, 0.03)])
def test_batches_are_those_of_step_time(strategy: Strategy, size: int, near: float) -> None:
    """Powers of two are its own counts, and sizes between are near them."""
    trace = skewed()
    plan = place(trace, NODES, solving=Solving("load-only"), redundant_experts=4)
    found = DrawnBatches(plan, trace, strategy).of(size)
    time = step_time(plan, trace, Serving(strategy=strategy.placed_for, batch=size))
    assert found.link_rows == pytest.approx(time.busiest_link_rows, rel=near)
    assert found.expert_imbalance == pytest.approx(time.compute_imbalance, rel=near)
    assert found.experts_read == pytest.approx(time.experts_touched, rel=near)


def test_batches_too_large_to_be_followed_grow_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exflow.cost.batches, "_WORK", 8 * 4 * 3 * 2)  # 8 tokens of 4 ranks, 3 layers, top-2
    trace = skewed()
    plan = place(trace, NODES, solving=Solving("contiguous"))
    batches = DrawnBatches(plan, trace, Strategy.DISPATCH_COMBINE)
    assert batches.of(8) == batches.of(9) == batches.of(1 << 30) != batches.of(7)


def test_the_simulator_says_what_auto_says() -> None:
    """With figures of time for this batch in the plan, both predict the same step of the plan's strategy."""
    trace = split_sequences(skewed(), NODES.num_ranks)
    machine = Machine(Link(1e-5, 1e9), Link(1e-4, 1e8), 1e9, 1e9, flops_per_s=1e10)
    plan = place(trace, NODES, objective=Objective(Strategy.DISPATCH_COMBINE), solving=Solving("contiguous"))
    serving = Serving(batch=4)
    figures = {"made_for": serving.as_json(), "time": step_time(plan, trace, serving).as_json()}
    plan = replace(plan, expected=evaluate(plan, trace) | figures)
    expected = {
        each.strategy: each for each in predictions(Workload.of(MODEL, plan, 16, 32, 2), plan, machine)
    }
    assert set(expected) == set(strategies_on(NODES))
    for strategy in (
        Strategy.DISPATCH_COMBINE,
        Strategy.REPLICATED,
    ):  # others lack rows
        found = step(Variant.of(strategy, "contiguous", plan, trace), Point(MODEL, 16, 32, machine))
        assert found.seconds == pytest.approx(expected[strategy].step_s)
        assert found.prediction.memory_bytes == expected[strategy].memory_bytes


positive = st.floats(1e-6, 1e3)
links = st.builds(Link, st.floats(0, 10), positive, st.floats(0, 1))
machines = st.builds(
    Machine,
    links,
    links,
    positive,
    st.just(math.inf),
    *[st.floats(0, 10)] * 2,
    hides=st.floats(0, 1),
    transport=st.sampled_from(["eager", "collective", "one-sided"]),
    flops_per_s=positive,
)


@given(machines, st.floats(1, 100), st.integers(1, 64), st.integers(0, 64), st.integers(0, 9))
def test_laws(
    choice: list[Variant], machine: Machine, factor: float, batch: int, more: int, which: int
) -> None:
    """More bandwidth, less latency and faster arithmetic are never slower, a larger batch is never faster."""
    variant, point = choice[which % len(choice)], Point(MODEL, batch, 32, machine)
    seconds = step(variant, point).seconds * (1 + 1e-9)
    for name, link in (("inside", machine.inside), ("between", machine.between)):
        quick = Link(link.latency_s / factor, link.bytes_per_s * factor, link.peer_s / factor)
        faster = replace(machine, **{name: quick})  # type: ignore[arg-type]
        assert step(variant, replace(point, machine=faster)).seconds <= seconds
    for name in ("read_bytes_per_s", "flops_per_s"):
        faster = replace(machine, **{name: factor * getattr(machine, name)})
        assert step(variant, replace(point, machine=faster)).seconds <= seconds
    assert step(variant, replace(point, batch=batch + more)).seconds >= step(variant, point).seconds * (
        1 - 1e-9
    )


@given(machines, st.integers(1, 64))
def test_one_gpu_exchanges_nothing(machine: Machine, batch: int) -> None:
    trace = skewed()
    plan = place(trace, Topology(gpus_per_node=1), solving=Solving("contiguous"))
    (name,) = strategies_on(plan.topology)
    prediction = step(
        Variant.of(Strategy(name), "contiguous", plan, trace), Point(MODEL, batch, 32, machine)
    ).prediction
    assert prediction.exchange_s == prediction.background_s == 0


def test_crossovers_are_where_the_fastest_changes(choice: list[Variant]) -> None:
    """Just before a crossover the fastest strategy is still that of the point; at it, the one named."""
    machine = Machine(Link(1e-5, 1e9), Link(1e-4, 1e8), 1e10, 1e9, layer_s=1e-5)
    point = Point(MODEL, 32, 32, machine)

    def winner(at: Point) -> str:
        return min((step(variant, at) for variant in choice), key=lambda each: each.seconds).variant.strategy

    found = crossovers(choice, point)
    assert {each.quantity for each in found} >= {"K/V width", "batch", "context"}
    scaled = {quantity.name: quantity.scaled for quantity in quantities(NODES)}
    for each in found:
        assert winner(scaled[each.quantity](point, each.factor)[0]) == each.strategy != winner(point)
        if each.quantity not in ("batch", "context"):  # whole numbers
            before = each.factor**0.99
            assert winner(scaled[each.quantity](point, before)[0]) == winner(point)
    kv = next(each for each in found if each.quantity == "K/V width")
    assert kv.value == pytest.approx(kv.factor * MODEL.kv_width)


def test_presets() -> None:
    """Each can be read; those of H200s are what a report assumes of one node, and of several."""
    found = {path.stem: load_machine(path) for path in MACHINES.glob("*.yaml")}
    assert set(found) == {"h200", "h200-nccl", "h200-relayed", "a100-hdr", "hosts-1gbit", "single-gpu-nodes"}
    assert replace(found["h200"], between=times._ONE_NODE.between) == times._ONE_NODE
    assert found["h200-nccl"] == times._SEVERAL_NODES


Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Run) -> Run:
    """run(line): exit code, stdout and stderr of the command, in a folder with a trace, plans and a model."""
    monkeypatch.chdir(tmp_path)
    skewed().save(tmp_path / "trace")
    skewed(top_k=1).save(tmp_path / "other")
    place(skewed(), NODES, solving=Solving("contiguous")).save(tmp_path / "plan.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(MODEL.model_dump_json())
    return command_line


def test_the_command(run: Run) -> None:
    line = "simulate trace --model model --gpus 2 --gpus 4 --gpus 16 --gpus-per-node 2 --time-limit 0.2"
    code, out, err = run(f"{line} --json --figures drawn")
    assert code == 0, err
    two, four, sixteen = json.loads(out)["sizes"]
    assert [size["expert_parallel"] for size in (two, four, sixteen)] == [2, 4, 8]
    assert sixteen["copies"] == 2 and sixteen["batch"] == 16 * 64
    assert {row["strategy"] for row in two["steps"]} == {"dispatch-combine", "coherent", "replicated"}
    assert {row["strategy"] for row in four["steps"]} == set(strategies_on(NODES))
    for row in four["steps"]:
        parts = row["exchange_ms"] + row["compute_ms"] + row["background_ms"]
        assert row["step_ms"] == pytest.approx(parts)
        assert row["tokens_per_s"] == pytest.approx(4 * 64 / row["step_ms"] * 1e3)
    for name in ("step-time", "throughput"):
        assert Path("drawn", f"{name}.svg").read_text().startswith("<svg")
    code, out, err = run(f"{line} --expert-parallel 2 --expert-parallel 4 --batch 8")
    assert code == 0
    for size in (4, 2):
        assert f"16 GPUs, expert-parallel size {size}: " in out


def test_a_plan_is_simulated_on_its_own_gpus_and_on_multiples(run: Run) -> None:
    code, out, err = run("simulate trace plan.json --model model --gpus 4 --gpus 8 --json")
    assert code == 0, err
    four, eight = json.loads(out)["sizes"]
    assert {row["placement"] for row in four["steps"]} == {"contiguous", "plan.json"}
    assert [row["step_ms"] for row in four["steps"]] == [row["step_ms"] for row in eight["steps"]]
    assert eight["steps"][0]["tokens_per_s"] == pytest.approx(2 * four["steps"][0]["tokens_per_s"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trace", "--gpus is missing"),
        ("trace --gpus 2 --batch 4 --batch-per-gpu 2", "give one"),
        ("trace plan.json --gpus 6", "--gpus 6: is no multiple of the 4 ranks of plan.json"),
        ("trace plan.json --expert-parallel 2", "--expert-parallel 2"),
        ("other --gpus 2", "top_k"),
        ("trace --gpus 2 --machine none.yaml", "none.yaml"),
        ("none --gpus 2", "none"),
    ],
)
def test_bad_input(run: Run, arguments: str, said: str) -> None:
    code, _, err = run(f"simulate {arguments} --model model --time-limit 0.1")
    assert code == 2 and said in err and err.count("\n") == 1
