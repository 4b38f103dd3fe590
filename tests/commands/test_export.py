"""`exflow export` and `exflow import-plan`: files, what is printed, and what bad input gets."""

import ast
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from exflow.job import outcome
from exflow.placement.formats.exporters.registry import FORMATS, export_plan
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Run, tmp_path: Path) -> Run:
    """run("export plan.json ...") in a folder with a plan and a trace: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outcome, "torchrun_place", lambda: None)
    experts = np.random.default_rng(0).integers(0, 4, (40, 2, 2))
    trace = RoutingTrace.from_arrays(experts, num_experts=4, moe_layer_ids=[1, 3], model="tiny")
    trace.save("trace")
    plan = Plan.of_slots(
        np.array([[0, 1, 2, 3], [0, 2, 1, 3]]),
        Topology(num_nodes=2, gpus_per_node=1),
        trace,
        method="by hand",
        strategy="dispatch-combine",
    )
    plan.save("plan.json")
    replace(plan, strategy="coherent").save("coherent.json")
    return command_line


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(run: Run, format: str) -> None:
    plan = "coherent.json" if format == "exflow" else "plan.json"
    code, out, err = run(f"export {plan} --format {format} -o map.json --json")
    assert (code, err) == (0, "")
    exported = json.loads(out)
    assert set(exported) == {"file", "sidecar", "format", "options", "traps", "warning"}
    assert (exported["file"], exported["sidecar"]) == ("map.json", "map.json.meta.json")
    assert exported["format"] == format
    assert exported["options"] and exported["traps"] and exported["warning"] is None

    code, out, err = run("import-plan map.json -o back.json --json")
    assert (code, err) == (0, "")
    imported = json.loads(out)
    assert (imported["plan"], imported["model"], imported["method"]) == ("back.json", "tiny", "by hand")
    assert (imported["ranks"], imported["nodes"], imported["slots"]) == (2, 2, 4)
    before, after = Plan.load(plan), Plan.load("back.json")
    assert np.array_equal(before.physical_to_logical_map, after.physical_to_logical_map)
    assert (before.topology, before.strategy) == (after.topology, after.strategy)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "exflow"])
def test_export_warns_of_a_plan_for_what_no_engine_runs(run: Run, format: str) -> None:
    code, out, err = run(f"export coherent.json --format {format} -o map.json --json")
    warning = f"the plan was made for strategy coherent, but the engine of {format} runs dispatch-combine; "
    assert code == 0
    assert json.loads(out)["warning"].startswith(warning)
    assert err.startswith(f"exflow: {warning}")
    assert f"exflow place --for {FORMATS[format].target}" in err and err.count("\n") == 1
    assert run(f"export coherent.json --format {format} -o map.json --quiet")[2] == ""


def test_export_says_how_to_use_the_file(run: Run) -> None:
    code, out, _ = run("export plan.json --format sglang -o map.json")
    assert code == 0
    assert "map.json for sglang; map.json.meta.json keeps what it cannot say" in out
    assert "  --init-expert-location map.json\n" in out
    assert "32962" in out


@pytest.mark.parametrize(
    "name", ["a b.json", "it's.json", "$(date).json", 'a"b\\c.json', "a;b&c #d.json", "-x.json"]
)
def test_what_is_to_be_copied_is_quoted(run: Run, name: str) -> None:
    """A shell, YAML and Python each get the very name."""
    path, plan = Path("a folder", name), Plan.load("plan.json")
    shell = {
        format: [word for line in export_plan(plan, format, path).usage.options for word in shlex.split(line)]
        for format in ("sglang", "vllm", "vllm-ascend")
    }
    assert shell["sglang"][shell["sglang"].index("--init-expert-location") + 1] == str(path)
    dashed = export_plan(plan, "sglang", Path("-x.json")).usage.options
    assert "--init-expert-location ./-x.json" in dashed
    assert json.loads(shell["vllm"][-1])["initial_expert_map_path"] == str(path)
    assert json.loads(shell["vllm-ascend"][-1])["eplb_config"]["expert_map_path"] == str(path)
    options = yaml.safe_load("\n".join(export_plan(plan, "trtllm", path).usage.options))
    assert options["moe_config"]["load_balancer"] == str(path)
    program = ast.parse(export_plan(plan, "eplb", path).usage.options[0])
    assert [each.value for each in ast.walk(program) if isinstance(each, ast.Constant)] == [str(path)]


def test_a_placement_made_elsewhere_is_judged_like_our_own(run: Run) -> None:
    run("export plan.json --format trtllm -o moe.yaml")
    Path("moe.yaml.meta.json").unlink()
    code, out, _ = run("import-plan moe.yaml --trace trace --gpus 2 --nodes 2 -o back.json --json")
    assert (code, json.loads(out)["method"]) == (0, "imported from trtllm")
    _, ours, _ = run("evaluate plan.json trace --json")
    _, theirs, _ = run("evaluate back.json trace --json")
    assert json.loads(ours) | {"method": "imported from trtllm"} == json.loads(theirs)
    assert np.array_equal(Plan.load("plan.json").next_owner, Plan.load("back.json").next_owner)  # type: ignore[arg-type]


def test_the_topology_may_be_a_file(run: Run) -> None:
    Path("cluster.yaml").write_text(
        "nodes: 1\ngpus_per_node: 2\nintra_node: {latency_us: 2, bandwidth_gb_s: 400}\n"
    )
    run("export plan.json --format vllm -o map.json")
    code, _, _ = run("import-plan map.json --topology cluster.yaml -o back.json")
    assert code == 0
    assert Plan.load("back.json").topology.link_cost is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export none.json --format sglang -o map.json", "none.json: no such plan"),
        ("export plan.json --format pt -o map.json", "format 'pt' is not known; give one of sglang, "),
        ("export plan.json --format sglang -o map.txt", "map.txt: sglang reads only files that end in .json"),
        (
            "export plan.json --format exflow -o map\x7f.csv",
            r"map\x7f.csv: the name cannot be copied from a terminal; choose another",
        ),
        ("export plan.json --format vllm -o plan.json/map.json", "plan.json/map.json: cannot be written"),
        ("import-plan none.json -o back.json", "none.json: cannot be read"),
        ("import-plan plan.json -o back.json", "plan.json: is a plan already; evaluate it as it is"),
        ("import-plan map.json -o back.json", "map.json: does not say the model's layers and experts"),
        ("import-plan map.json --trace trace -o back.json", "map.json: does not say the number of GPUs"),
        ("import-plan map.json --trace none --gpus 2 -o back.json", "none"),
        ("import-plan map.json --trace trace --gpus 3 -o back.json", "map.json: physical_to_logical_map: 4"),
        ("import-plan map.json --trace trace --gpus 3 --nodes 2 -o back.json", "3 GPUs cannot be spread"),
        (
            "import-plan map.json --trace trace --nodes 2 -o back.json",
            "--nodes 2: needs --gpus; give both",
        ),
        (
            "import-plan map.json --trace trace --gpus 2 --topology a.yaml -o back.json",
            "--gpus and --topology both say where the GPUs are; give one",
        ),
        ("import-plan map.json --trace trace --gpus 2 --format pt -o back.json", "format 'pt' is not known"),
        (
            "import-plan map.json --trace trace --gpus 2 --format trtllm -o back.json",
            "map.json: the file: is [[0, 1, 2, 3], [0, 1, 2, 3]]; give an object with the keys",
        ),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(run: Run, line: str, message: str) -> None:
    Path("map.json").write_text("[[0, 1, 2, 3], [0, 1, 2, 3]]")
    before = sorted(Path().iterdir())
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert err.startswith("exflow: ") and err.count("\n") == 1
    assert message in err
    assert sorted(Path().iterdir()) == before
