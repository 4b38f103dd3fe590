"""`exflow place` by its default objective: what it prints, stores and refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from exflow.cli import app
from exflow.errors import InputError
from exflow.placement.fastest_plan import compared, references
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machines import machine_named
from exflow.placement.time.serving import TARGETS, Serving
from exflow.placement.time.sizes import UNKNOWN, sizes_for_trace, sizes_of
from exflow.placement.traffic.confidence import split_by_sequence
from exflow.profiling.trace import RoutingTrace

TIMES = {
    "step_us",
    "exchange_us",
    "experts_us",
    "attention_us",
    "busiest_link_rows",
    "compute_imbalance",
    "messages",
    "node_link_rows",
    "experts_touched",
}


def save_trace(folder: Path, top_k: int) -> Path:
    rng = np.random.default_rng(top_k)
    hot = rng.gamma(0.7, size=(3, 8)) + 0.05
    experts = [[rng.choice(8, top_k, replace=False, p=row / row.sum()) for row in hot] for _ in range(400)]
    trace = RoutingTrace.from_arrays(
        np.array(experts), num_experts=8, sequence=np.arange(400) // 10, model="openai/gpt-oss-20b"
    )
    trace.save(folder)
    return folder


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trace(tmp_path_factory.mktemp("time") / "trace", 2)


def exflow_place(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["place", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def placed(plan: Path, *arguments: str | Path) -> tuple[Plan, dict[str, Any]]:
    shown = exflow_place(*arguments, "-o", plan, "--json")
    return Plan.load(plan), json.loads(shown)


def test_the_time_is_that_of_the_plan_on_tokens_that_it_has_not_seen(trace: Path, tmp_path: Path) -> None:
    plan, shown = placed(tmp_path / "plan.json", trace, "--gpus", "4", "--for", "sglang", "--holdout", "0.25")
    train, test = split_by_sequence(RoutingTrace.load(trace), 0.25)
    serving = Serving("sglang", machine=machine_named("h200"), sizes=sizes_of("gpt-oss-20b"))
    others = references(train, plan.topology, serving.strategy, plan.num_slots)
    assert plan.strategy == Strategy.DISPATCH_COMBINE
    assert shown["time"] == compared(plan, others, train, serving)
    assert shown["held_out_time"] == compared(plan, others, test, serving)
    assert shown["made_for"] == serving.as_json()
    assert set(shown["time"]) == TIMES | {"ratio_to_contiguous", "references"}
    assert shown["time"]["step_us"] == shown["objective"] >= shown["lower_bound"] > 0


def test_the_last_line_says_what_was_gained(trace: Path, tmp_path: Path) -> None:
    *_, setting, last = exflow_place(trace, "--gpus", "4", "-o", tmp_path / "plan.json").splitlines()
    share = Plan.load(tmp_path / "plan.json").expected["time"]["ratio_to_contiguous"]
    assert last.startswith(
        f"{100 * (1 - share):.1f}% less time than experts in order on the tokens placed on"
    )
    assert setting == "for exflow, dispatch-combine, on h200, with gpt-oss-20b, 64 tokens a GPU"


def test_top_1_runs_coherently_in_our_runtime_alone(tmp_path: Path) -> None:
    trace = save_trace(tmp_path / "top-1", 1)
    ours, _ = placed(tmp_path / "plan.json", trace, "--gpus", "2")
    theirs, _ = placed(tmp_path / "plan.json", trace, "--gpus", "2", "--for", "vllm")
    assert (ours.strategy, theirs.strategy) == (Strategy.COHERENT, Strategy.DISPATCH_COMBINE)


def test_a_baseline_is_what_was_asked_for(trace: Path, tmp_path: Path) -> None:
    plan, shown = placed(tmp_path / "plan.json", trace, "--gpus", "2", "--method", "contiguous")
    assert plan.method == "contiguous"
    assert shown["time"]["ratio_to_contiguous"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "mlx"], "target 'mlx' is unknown; give one of exflow, sglang"),
        (["--machine", "abacus"], "machine 'abacus' is unknown; give one of a100-hdr, h200"),
        (["--model", "gpt-2"], "model 'gpt-2' is unknown; give one of deepseek-v2-lite, "),
        (["--objective", "fame"], "objective 'fame' is unknown; give time or messages"),
        (["--for", "sglang", "--strategy", "coherent"], "strategy coherent: sglang runs dispatch-combine"),
        (["--for", "transformers", "--redundant-experts", "4"], "4: transformers holds no replicas"),
        (["--objective", "time", "--pareto"], "--pareto: belongs to --objective messages"),
        (["--strategy", "none"], "strategy 'none' is unknown"),
        (["--keep-groups", "3"], "keep groups 3: does not divide the 8 experts of a layer"),
        (["--keep-groups", "4", "--redundant-experts", "2"], "4: groups stay in order only without replicas"),
        (["--keep-groups", "4", "--method", "load-only"], "4: method load-only does not keep groups"),
        (["--keep-groups", "4", "--objective", "messages"], "--keep-groups: belongs to --objective time"),
        (["--phase", "dreams"], "phase dreams: no such phase"),
        (["--phase", "all", "--phase", "decode"], "name each phase once, or all alone"),
    ],
)
def test_bad_input(trace: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        exflow_place(trace, "--gpus", "2", "-o", tmp_path / "plan.json", *options)
    assert message in str(error.value)
    assert not (tmp_path / "plan.json").exists()


def test_sizes_are_those_published() -> None:
    """Weights of one expert: three matrices of the hidden width by the inner one."""
    assert sizes_of("deepseek-v3").expert_weights == 3 * 7168 * 2048
    assert sizes_of("Qwen3-30B-A3B").expert_weights == 3 * 2048 * 768
    assert sizes_of("gpt-oss-20b") == sizes_for_trace("openai/gpt-oss-20b")
    assert sizes_of("deepseek-v3").kv_bytes == 2 * 576
    assert sizes_of("mixtral-8x7b").kv_bytes == 2 * 2 * 8 * 128
    assert sizes_for_trace("somebody/else") is UNKNOWN


def test_a_configuration_without_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(InputError, match=r"config\.json: has no moe_intermediate_size or intermediate_size"):
        sizes_of(str(tmp_path))


def test_the_names_that_are_completed() -> None:
    from exflow.cli import options
    from exflow.commands.place import OBJECTIVES

    assert set(options.TARGETS) == set(TARGETS)
    assert options.OBJECTIVES == OBJECTIVES


def test_evaluate_says_the_time_on_any_trace(trace: Path, tmp_path: Path) -> None:
    """On the machine and the batch that the plan was made for, unless told otherwise."""
    _, shown = placed(
        tmp_path / "plan.json",
        *(trace, "--gpus", "4", "--for", "vllm"),
        *("--machine", "single-gpu-nodes", "--batch", "16"),
    )

    def evaluated(*options: str) -> dict[str, Any]:
        command = ["evaluate", str(tmp_path / "plan.json"), str(trace), "--json", *options]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        figures: dict[str, Any] = json.loads(result.stdout)
        return figures

    assert evaluated()["time"] == shown["time"]
    assert evaluated()["made_for"] == shown["made_for"]
    assert evaluated("--machine", "h200", "--batch", "64")["made_for"]["machine"] == "h200"
    assert evaluated("--machine", "h200")["time"]["exchange_us"] < shown["time"]["exchange_us"]


def test_a_phase_without_tokens(trace: Path, tmp_path: Path) -> None:
    assert placed(tmp_path / "plan.json", trace, "--gpus", "2", "--phase", "decode")[0].num_ranks == 2
    with pytest.raises(InputError, match="phase prefill: the trace holds no such tokens"):
        exflow_place(trace, "--gpus", "2", "--phase", "prefill", "-o", tmp_path / "other.json")


def test_each_phase_gets_a_plan_of_its_own(tmp_path: Path) -> None:
    one, rng = RoutingTrace.load(save_trace(tmp_path / "decode", 2)), np.random.default_rng(1)
    trace = RoutingTrace.from_arrays(
        one.experts, num_experts=8, sequence=one.sequence, phase=rng.integers(0, 2, 400), model=one.model
    )
    trace.save(tmp_path / "both")
    phases = ("--phase", "prefill", "--phase", "decode")
    shown = json.loads(
        exflow_place(tmp_path / "both", "--gpus", "2", *phases, "-o", tmp_path / "plan.json", "--json")
    )
    for phase, batch in (("prefill", 2048), ("decode", 64)):
        plan = Plan.load(tmp_path / f"plan.{phase}.json")
        assert plan.trace_digest == trace.of_phase(phase).digest()
        assert shown[phase]["made_for"]["batch"] == plan.expected["made_for"]["batch"] == batch
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(("groups", "gpus"), [(2, 4), (4, 2), (4, 4)])
def test_groups_stay_together_and_in_order(trace: Path, tmp_path: Path, groups: int, gpus: int) -> None:
    plan, shown = placed(
        tmp_path / "plan.json", trace, "--gpus", str(gpus), "--keep-groups", str(groups), "--for", "vllm"
    )
    of_group = plan.physical_to_logical_map // (8 // groups)
    assert np.array_equal(of_group, np.tile(np.arange(groups).repeat(8 // groups), (3, 1)))
    assert shown["made_for"]["keep_groups"] == groups
    assert shown["time"]["ratio_to_contiguous"] <= 1.0
    assert (groups >= gpus) == np.array_equal(plan.rank_of_expert, np.tile(np.arange(8) * gpus // 8, (3, 1)))


def test_notes_say_what_a_user_should_know(trace: Path, tmp_path: Path) -> None:
    def notes(*arguments: str) -> list[str]:
        found: list[str] = placed(tmp_path / "plan.json", trace, *arguments)[1]["notes"]
        return found

    few = "The trace has 400 tokens, 100 choices of each expert in a layer"
    assert not any(each.startswith("The trace has") for each in notes("--gpus", "2"))
    held_out = notes("--gpus", "2", "--holdout", "0.25")
    assert any(each.startswith(few.replace("400", "300").replace(" 100 ", " 75 ")) for each in held_out)
    assert any(each.startswith("Only 10 sequences were held out") for each in held_out)
    assert any(
        each.startswith("3 GPUs share slots equally only if there are 9: 1 more")
        for each in notes("--gpus", "3")
    )
    many = notes("--gpus", "12")
    assert many[0] == (
        "There are more GPUs (12) than experts (8): each expert has 1 or 2 replicas in the mean."
    )


def test_an_engine_is_told_where_redundant_experts_cost_time(trace: Path, tmp_path: Path) -> None:
    """One batch reads every replica that SGLang serves from; our own runtime leaves it alone."""
    spare = ("--gpus", "4", "--redundant-experts", "4", "--method")
    plan, shown = placed(tmp_path / "plan.json", trace, *spare, "auto", "--for", "sglang")
    assert any(each.startswith("Without redundant experts a step takes") for each in shown["notes"])
    assert shown["time"]["without_replicas_us"] < shown["time"]["step_us"]
    plan, shown = placed(tmp_path / "plan.json", trace, *spare, "auto", "--for", "exflow")
    assert plan.num_slots == 12
    assert shown["time"]["without_replicas_us"] >= shown["time"]["step_us"]
    assert Plan.load(tmp_path / "plan.json").serving_rank is not None


def test_topology_is_what_nvidia_smi_or_a_cost_matrix_says(trace: Path, tmp_path: Path) -> None:
    saved, costs = tmp_path / "saved", tmp_path / "costs.json"
    saved.write_text("\tGPU0\tGPU1\nGPU0\t X \tSYS\nGPU1\tSYS\t X \n")
    costs.write_text("[[0, 0.8192], [0.8192, 0]]")
    of_pair = ((0.0, 0.8192), (0.8192, 0.0))
    plan, _ = placed(tmp_path / "plan.json", trace, "--topology", saved)
    assert plan.topology == Topology(gpus_per_node=2, link_cost=of_pair)
    plan, _ = placed(tmp_path / "plan.json", trace, "--cost-matrix", costs, "--nodes", "2")
    assert plan.topology == Topology(num_nodes=2, gpus_per_node=1, link_cost=of_pair)
