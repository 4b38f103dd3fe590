"""The report: a page that stands alone, whole for models of all sizes, and the command that writes it."""

import json
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import numpy as np
import pytest

from exflow.placement.counts.affinity import count_affinity
from exflow.placement.make_plan import place
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.profiling.trace import RoutingTrace
from exflow.report.draw import png
from exflow.report.followers import followers
from tests.report.pages import EVIL, STRATEGIES, Checked, Run, make_trace, save


@pytest.mark.parametrize(
    ("experts", "layers", "top_k", "topology", "most_bytes"),
    [
        (8, 4, 2, Topology(gpus_per_node=4), 300_000),
        (32, 12, 4, Topology(num_nodes=2, gpus_per_node=4), 800_000),
        (256, 58, 8, Topology(num_nodes=4, gpus_per_node=8), 3_000_000),
    ],
)
def test_a_page_for_every_size(
    run: Run, experts: int, layers: int, top_k: int, topology: Topology, most_bytes: int
) -> None:
    save(make_trace(experts, layers, top_k), topology)
    run("report trace plan.json -o report.html --figures drawings")
    text = Path("report.html").read_text()
    assert len(text.encode()) < most_bytes
    page = Checked(text)

    names = {"expert-load", "affinity", "local", "certainty", "trade-off", "traffic-coherent"}
    names |= {"traffic-dispatch-combine"} | ({"traffic-node-coherent"} if topology.num_nodes > 1 else set())
    names |= {f"{kind}-{plan}" for kind in ("gpu-load", "pairs") for plan in ("contiguous", "plan")}
    names |= {f"routes-{plan}-0" for plan in ("contiguous", "plan")}
    assert {f"fig-{name}" for name in names} <= set(page.ids)
    assert page.tags["figure"] == page.tags["details"] == text.count("<figure id=")
    assert max(page.ids.values()) == 1
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert ("a cell is a block of 4 by 4" in text) == (experts == 256)

    files = {path.stem for path in Path("drawings").iterdir()}
    assert names <= files
    for path in Path("drawings").iterdir():
        root = ET.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in path.read_text()


def test_the_page_asks_no_one_for_anything(run: Run) -> None:
    save(make_trace(), Topology(gpus_per_node=4))
    run("report trace plan.json -o report.html")
    text = Path("report.html").read_text()
    assert all(address.startswith("data:") for address in Checked(text).addresses)
    assert not re.search(r"https?:|//[a-z]|@import|\bimport\(|fetch\(|XMLHttp|sendBeacon|WebSocket", text)
    assert all(found.startswith("#") for found in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "default-src 'none'" in text


def test_names_are_text_and_nothing_else(run: Run, tmp_path: Path) -> None:
    save(make_trace(model=EVIL), Topology(gpus_per_node=2), "<b>plan</b>.json".replace("/", "_"))
    run("report trace <b>plan<_b>.json -o report.html")
    text = Path("report.html").read_text()
    assert "alert(1)</script>" not in text
    assert "<b>" not in text
    page = Checked(text)
    assert page.tags["script"] == 2
    assert EVIL in page.text
    assert any("<b>plan<_b>" in each for each in page.text)


def test_every_figure_says_what_it_is_and_has_its_numbers(run: Run) -> None:
    save(make_trace(), Topology(gpus_per_node=4))
    run("report trace plan.json -o report.html")
    text = Path("report.html").read_text()
    drawings = re.findall(r"<svg viewBox[^>]*>", text)
    assert drawings
    assert all('role="img" aria-label="' in each for each in drawings)
    assert len(re.findall(r"<details><summary>Numbers: [^<]+</summary><div[^>]*><table>", text)) == len(
        drawings
    )
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    assert text.count("<label>") == text.count("<select") + text.count("<input")


def test_json_holds_the_data_behind_the_page(run: Run) -> None:
    plan = save(make_trace(), Topology(num_nodes=2, gpus_per_node=2))
    result = json.loads(run("report trace plan.json -o report.html --json"))
    assert result["bytes"] == Path("report.html").stat().st_size
    assert (result["trace"]["prefill_tokens"], result["trace"]["decode_tokens"]) == (120, 280)
    assert np.array(result["trace"]["load"]).sum() == 400 * 4 * 2
    assert [each["name"] for each in result["plans"]] == ["contiguous", "plan"]
    ours = result["plans"][1]
    assert set(ours["strategies"]) == STRATEGIES
    assert ours["on_its_own_trace"]
    assert ours["gap"] == plan.gap
    for name, counts in ours["counts"].items():
        messages = ours["strategies"][name]["totals"]["messages"]
        assert np.array(counts["messages_by_layer"]).sum() == messages
        assert np.array(counts["messages_by_pair"]).sum() == messages
        assert (np.array(counts["load"]).sum(axis=1) == 400 * 2).all()
        assert (np.array(counts["moves"]).sum(axis=(1, 2)) == 400).all()
    assert [point["sequences"] for point in ours["by_tokens"]] == [10, 20, 40]
    last = ours["by_tokens"][-1]["messages"]
    assert last["value"] == pytest.approx(ours["strategies"]["coherent"]["messages_per_token_layer"])
    assert last["low"] <= last["value"] <= last["high"]


def test_a_plan_for_node_coherent_on_one_node_beside_others(run: Run) -> None:
    trace = make_trace()
    save(trace, Topology(gpus_per_node=2))
    objective = Objective(strategy=Strategy.NODE_COHERENT)
    place(trace, Topology(gpus_per_node=2), objective=objective).save("node.json")
    run("report trace plan.json node.json -o report.html")
    assert "made for <a" in Path("report.html").read_text()


def test_without_plans_there_is_the_trace_and_with_gpus_the_baseline(run: Run) -> None:
    make_trace().save("trace")
    alone = json.loads(run("report trace -o report.html --json"))
    assert alone["plans"] == []
    assert "Load of each expert" in Path("report.html").read_text()
    judged = json.loads(run("report trace --gpus 4 --nodes 2 -o report.html --phase decode --json"))
    assert [each["name"] for each in judged["plans"]] == ["contiguous"]
    assert judged["trace"]["tokens"] == 280
    Checked(Path("report.html").read_text())


def test_plans_for_other_gpus_have_a_baseline_each(run: Run) -> None:
    trace = make_trace()
    save(trace, Topology(gpus_per_node=2), "for-two.json")
    save(trace, Topology(gpus_per_node=4), "for_two.json")
    result = json.loads(run("report trace for-two.json for_two.json -o report.html --json"))
    assert [each["ranks"] for each in result["plans"]] == [2, 2, 4, 4]
    assert [each["name"] for each in result["plans"]][1::2] == ["for-two", "for_two"]
    assert max(Checked(Path("report.html").read_text()).ids.values()) == 1


def test_a_topology_says_where_plans_are_judged(run: Run) -> None:
    save(make_trace(), Topology(gpus_per_node=4))
    Path("nodes.yaml").write_text(
        "nodes: 2\ngpus_per_node: 2\nintra_node: {latency_us: 2, bandwidth_gb_s: 400}\n"
        "inter_node: {latency_us: 5, bandwidth_gb_s: 50}\nmessage_bytes: 8192\n"
    )
    result = json.loads(run("report trace plan.json --topology nodes.yaml -o report.html --json"))
    assert [each["nodes"] for each in result["plans"]] == [2, 2]
    error = run("report trace plan.json --gpus 8 -o other.html", code=2)
    assert "plan.json: the plan is for 4 ranks" in error
    assert not Path("other.html").exists()


@pytest.mark.parametrize(
    ("experts", "layers", "top_k", "gpus"), [(4, 1, 1, 1), (4, 2, 1, 2), (6, 3, 2, 4), (3, 2, 2, 8)]
)
def test_small_and_odd_shapes(run: Run, experts: int, layers: int, top_k: int, gpus: int) -> None:
    make_trace(experts, layers, top_k, model="").save("trace")
    run(f"report trace --gpus {gpus} -o report.html --figures drawings")
    Checked(Path("report.html").read_text())


def test_few_tokens_an_expert_without_any_and_layers_of_unequal_size(run: Run) -> None:
    trace = RoutingTrace.from_arrays(
        [[[0], [1]], [[0], [0]]], num_experts=4, experts_per_layer=[4, 2], moe_layer_ids=[1, 3]
    )
    trace.save("trace")
    run("report trace --gpus 2 -o report.html")
    text = Path("report.html").read_text()
    Checked(text)
    assert "Too few sequences" in text
    assert "nan" not in text.lower().replace("nan(", "")


def test_times_are_predicted_for_a_model_that_is_given(run: Run) -> None:
    save(make_trace(), Topology(gpus_per_node=4))
    Path("model").mkdir()
    config = {"vocab_size": 64, "max_positions": 64, "num_hidden_layers": 4, "hidden_size": 64}
    config |= {"num_attention_heads": 4, "num_kv_heads": 2, "intermediate_size": 64}
    config |= {"num_experts": 8, "top_k": 2, "model_type": "gpt-moe"}
    Path("model/config.json").write_text(json.dumps(config))
    command = "report trace plan.json --model model --batch 16 -o report.html"
    result = json.loads(run(f"{command} --json"))
    times = result["plans"][1]["predicted"]
    assert [each["strategy"] for each in times] == ["dispatch-combine", "coherent", "replicated"]
    assert all(each["step_s"] > 0 and each["fits"] for each in times)
    text = Path("report.html").read_text()
    assert 'id="fig-step-time"' in text
    assert "A prediction by the cost model" in text

    machine = "{inside: {latency_s: 1.0, bytes_per_s: 1.0e9}, between: {latency_s: 1.0, bytes_per_s: 1.0e9}, "
    Path("slow.yaml").write_text(machine + "read_bytes_per_s: 1.0e9, memory_bytes: 1.0}")
    slow = json.loads(run(f"{command} --machine slow.yaml --json"))["plans"][1]["predicted"]
    assert slow[0]["step_s"] > 8
    assert not slow[0]["fits"]
    Path("date.yaml").write_text("inside: 2001-13-45")
    assert "date.yaml: the file of a machine is not YAML (month" in run(
        f"{command} --machine date.yaml", code=2
    )
    Path("typo.yaml").write_text(machine + "memory: 1.0}")
    assert "typo.yaml: unknown key 'memory'" in run(f"{command} --machine typo.yaml", code=2)
    Path("model/config.json").write_text(json.dumps(config | {"top_k": 1}))
    assert "the model has top_k 1, the trace 2" in run(command, code=2)


def test_bad_input_is_one_line_and_leaves_the_old_page(run: Run) -> None:
    save(make_trace(), Topology(gpus_per_node=2))
    make_trace(experts=4).save("other")
    Path("report.html").write_text("old")
    Path("file").touch()
    for line, message in (
        ("report other plan.json -o report.html", "plan.json: the plan is for 8 experts a layer"),
        ("report trace nowhere.json -o report.html", "nowhere.json: no such"),
        ("report trace plan.json plan.json -o report.html", "given twice"),
        ("report nowhere plan.json -o report.html", "nowhere"),
        ("report trace plan.json -o report.html --phase dream", "phase dream"),
        ("report trace plan.json -o report.html --nodes 2", "--nodes 2"),
        ("report trace plan.json -o report.html --machine slow.yaml", "machine 'slow.yaml' is unknown"),
        ("report trace -o report.html --machine h200", "--machine h200: needs a plan"),
        ("report trace -o report.html --model nowhere", "--model nowhere"),
        ("report trace plan.json -o report.html --model nowhere", "nowhere"),
        ("report trace plan.json -o report.html --figures file", "file"),
        ("report trace plan.json -o file/report.html", "file/report.html"),
    ):
        error = run(line, code=2)
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert Path("report.html").read_text() == "old"


def test_levels_become_pixels_and_come_back() -> None:
    levels = png.levels_of(np.array([[0.0, 0.5, 1.0], [np.nan, 2.0, -1.0]]), 0, 1)
    assert levels.tolist() == [[1, 128, 255], [png.NOTHING, 255, 1]]
    for palette in (None, [(i, 0, 0) for i in range(256)]):
        content = png.encode(levels, palette)
        np.testing.assert_array_equal(png.decode(content), levels)
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        at = 8
        while at < len(content):  # every chunk: length, name, content, checksum
            (length,) = struct.unpack(">I", content[at : at + 4])
            chunk, end = content[at + 4 : at + 8 + length], at + 8 + length
            assert content[end : end + 4] == struct.pack(">I", zlib.crc32(chunk))
            at = end + 4


def test_the_likeliest_follower_stands_out() -> None:
    trace = RoutingTrace.from_arrays([[[0], [1]]] * 3 + [[[1], [0]]], num_experts=2)
    first, second = followers(count_affinity(trace), most=1)
    assert (first.expert, first.follower, first.share) == (0, 1, 1.0)
    assert first.times_chance == pytest.approx(4 / 3)
    assert (second.expert, second.follower, second.share, second.times_chance) == (1, 0, 1.0, 4.0)
