"""The tables of time: those of evaluate, on the same tokens, in the setting that a plan was made for."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from exflow.commands.evaluate import run_evaluate
from exflow.placement.fastest_plan import place_for_time
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machines import machine_named
from exflow.placement.time.serving import Serving
from exflow.report.draw.figure import number
from tests.report.pages import Run, make_trace, save

FOUR = Topology(gpus_per_node=4)
SGLANG = Serving("sglang", Strategy.DISPATCH_COMBINE, machine_named("single-gpu-nodes"), batch=16)


def saved(name: str = "fast.json", serving: Serving = SGLANG) -> Plan:
    """A plan made for a setting, beside its trace."""
    make_trace().save("trace")
    plan = place_for_time(make_trace(), FOUR, serving, time_limit=0.5)
    plan.save(name)
    return plan


def tables() -> list[str]:
    """The tables of the section, each with the sentence above it, as text."""
    section = Path("report.html").read_text().split('<section id="times"')[1].split("</section>")[0]
    found = re.findall("<p>.*?</table>", section, re.DOTALL)
    return [" ".join(re.sub("<[^>]*>", "", part).split()) for part in found]


def test_the_time_is_that_of_evaluate_in_the_setting_of_the_plan(run: Run) -> None:
    saved()
    base, plan = json.loads(run("report trace fast.json -o report.html --json"))["plans"]
    told = run_evaluate(Path("fast.json"), Path("trace"), "all", None, None, None)
    assert plan["time"] == told["time"]
    assert plan["made_for"] == told["made_for"] == SGLANG.as_json()
    assert base["made_for"] == plan["made_for"]
    assert base["time"]["step_us"] == plan["time"]["references"]["contiguous"]["step_us"]
    assert base["time"]["ratio_to_contiguous"] == 1
    (table,) = tables()
    assert "of sglang under dispatch-combine, on 4 GPUs" in table
    assert (
        "machine single-gpu-nodes" in table
        and "16 tokens a GPU (the setting that a plan here was made" in table
    )
    for name in ("contiguous placement", "placement by load alone", "fast"):
        assert name in table
    for figure in (
        "step_us",
        "exchange_us",
        "experts_us",
        "busiest_link_rows",
        "compute_imbalance",
        "messages",
    ):
        assert number(plan["time"][figure]) in table


def test_options_replace_machine_and_model(run: Run) -> None:
    saved()
    _, plan = json.loads(run("report trace fast.json -o report.html --machine h200 --json"))["plans"]
    assert (plan["made_for"]["machine"], plan["made_for"]["batch"]) == ("h200", 16)
    assert plan["predicted"] == []  # the whole step needs a model


def test_plans_for_other_settings_have_a_table_each(run: Run) -> None:
    plan = saved()
    saved("other.json", replace(SGLANG, batch=32))
    plan.save("same.json")
    save(make_trace(), FOUR, "plain.json")  # made for no setting
    run("report trace fast.json same.json other.json plain.json -o report.html")
    first, second, third = tables()
    assert "16 tokens a GPU" in first and "fast" in first and "same" in first
    assert "32 tokens a GPU" in second and "other" in second
    assert "64 tokens a GPU (the default setting" in third and "attention" in third


def test_the_baseline_alone_is_timed_too(run: Run) -> None:
    make_trace().save("trace")
    run("report trace --gpus 4 -o report.html")
    (table,) = tables()
    assert "placement by load alone" in table
    run("report trace -o report.html")
    assert 'id="times"' not in Path("report.html").read_text()


def test_the_time_needs_no_torch(run: Run) -> None:
    saved()
    code = "import sys; from exflow.cli import app; app(sys.argv[1:], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "report", "trace", "fast.json", "-o", "report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
