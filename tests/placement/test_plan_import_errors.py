"""Malformed, damaged and hostile placement files are refused in one line."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from exflow.errors import InputError
from exflow.placement.formats.exporters.sidecar import sidecar_path
from exflow.placement.formats.importers import registry
from exflow.placement.formats.importers.registry import FORMATS, read_plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from tests.payload import Payload
from tests.placement.golden_plans import FILES, GOLDEN, golden

# Of the golden file: an expert's slots.
EPLB_SLOTS = np.array([[[0, 3], [1, -1], [2, 4], [5, -1]], [[2, -1], [3, -1], [1, 4], [0, 5]]])
# What is wrong with a file, the edit that makes it so, and what the error says.
Edit = Callable[[bytes], bytes]


def swap(old: str, new: str) -> Edit:
    def edit(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return edit


def tensors(**changes: Any) -> Edit:
    return lambda content: save(
        {name: value for name, value in (load(content) | changes).items() if value is not None}
    )


MALFORMED = [
    ("sglang", swap("]}", "]"), r"is not valid JSON \(.*\); give the file whole"),
    ("sglang", swap('"physical_to_logical_map"', '"logical_count"'), r"has no key 'physical_to_logical_map'"),
    ("sglang", swap("]}", '], "note": 1}'), r"unknown key 'note'; keep physical_to_logical_map alone"),
    (
        "sglang",
        swap("[0, 1, 2, 3, 0, 1],\n", ""),
        r"map: has 3 entries instead of 4; give one for each hidden",
    ),
    ("sglang", swap("[0, 1, 2, 3, 0, 1],", "[0, 1, 2, 3, 0],"), r"map\[1\]: has 6 slots, others 5; give all"),
    ("sglang", swap("[0, 1, 2, 3, 0, 1],", "7,"), r"map\[0\]: is 7; give the list of the experts"),
    ("sglang", swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 2, 2]"), r"layer 1: does not hold expert 3; place"),
    ("sglang", swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 3, 4]"), r"layer 1: holds expert 4, the model has 4"),
    ("sglang", swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 2, -3]"), r"map\[1\]\[5\]: is -3; give the id"),
    ("sglang", swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 2, 3.0]"), r"map\[1\]\[5\]: is 3.0; give the id"),
    ("sglang", swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 2, true]"), r"map\[1\]\[5\]: is True; give the id"),
    ("sglang", swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 2, NaN]"), r"map\[1\]\[5\]: is nan; give the id"),
    ("sglang", swap("[0, 1, 2, 0, 2, 3]", f"[{'9' * 5000}]"), r"is not valid JSON"),
    ("sglang", swap("]}", '], "physical_to_logical_map": []}'), r"map' is given twice; keep one"),
    ("sglang", lambda _: b'{"physical_to_logical_map": ' + b"[" * 100_000, r"is JSON nested too deeply"),
    ("vllm", swap("]\n]", "]"), r"is not valid JSON"),
    ("vllm", swap(",\n[3, 2, 0, 1, 2, 3]", ""), r"list: has 1 entries instead of 2; give one for each MoE"),
    ("vllm", swap("[0, 1, 2, 0, 2, 3]", "[]"), r"MoE layer 0: is \[\]; give the list"),
    ("vllm", swap("[3, 2, 0, 1, 2, 3]", "[3, 2, 0, 1, 2]"), r"MoE layer 1: has 5 slots, others 6"),
    ("vllm", swap("[3, 2, 0, 1, 2, 3]", '[3, 2, 0, 1, 2, "3"]'), r"MoE layer 1\[5\]: is '3'; give the id"),
    ("vllm", lambda _: b"[[0, 1, 2, 3, 0], [0, 1, 2, 3, 0]]", r"5 slots cannot be shared equally by 2 ranks"),
    ("vllm-ascend", swap('count": 2, "layer', 'count": 3, "layer'), r"moe_layer_count: is 3 instead of 2"),
    ("vllm-ascend", swap('"layer_id": 1', '"layer_id": 2'), r"\[1\].layer_id: is 2 instead of 1, its place"),
    (
        "vllm-ascend",
        swap('"device_id": 1', '"device_id": 0'),
        r"device_list\[1\].device_id: is 0 instead of 1",
    ),
    ("vllm-ascend", swap('"device_count": 2', '"device_count": 9'), r"device_count: is 9 instead of 2, the"),
    (
        "vllm-ascend",
        swap("[0, 2, 3]", "[0, 2, 3, 1]"),
        r"device_list\[1\].device_expert: has 4 slots, others 3",
    ),
    ("vllm-ascend", swap("[0, 2, 3]", "[0, 2, null]"), r"device_expert\[2\]: is None; give the id"),
    (
        "vllm-ascend",
        swap('"device_expert": [0, 2, 3]', '"experts": []'),
        r"has no key 'device_expert'; add it",
    ),
    (
        "vllm-ascend",
        swap('"layer_id": 0,', '"layer_id": 0, "x": 0,'),
        r"layer_list\[0\]: unknown key 'x'; keep",
    ),
    ("trtllm", swap("num_slots: 6\n", ""), r"has no key 'num_slots'; add it"),
    (
        "trtllm",
        swap("num_slots: 6", "num_slots: 999999999"),
        r"num_slots: is 999999999 instead of 6, the length",
    ),
    (
        "trtllm",
        swap("num_slots: 6", "num_slots: 9999999999999"),
        r"num_slots: is '9999999999999' instead of 6",
    ),
    ("trtllm", swap("num_slots: 6", "num_slots: 6\nx: 1"), r"the file: unknown key 'x'; keep"),
    ("trtllm", swap("iter: 0", "iter: 2"), r"layer_updates_per_iter: is 2 instead of 0, with which nothing"),
    ("trtllm", swap("  3: [3, 2, 0, 1, 2, 3]\n", ""), r"has no entry for hidden layer 3; add it"),
    (
        "trtllm",
        swap("  3: [", "  2: ["),
        r"holds 2, which is no MoE layer of the model \(they are \[1, 3\]\)",
    ),
    ("trtllm", swap("  3: [", "  1: ["), r"line 3: the key 1 is given twice; keep one"),
    (
        "trtllm",
        swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 2"),
        r"is not YAML \(line \d: .*\); give the file whole",
    ),
    ("trtllm", swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 2, 0x3]"), r"assignments\[1\]\[5\]: is '0x3'; give"),
    (
        "trtllm",
        swap("[0, 1, 2, 0, 2, 3]", "[0, 1, 2, 0, 2, '3']"),
        r"assignments\[1\]\[5\]: is '3'; give the id",
    ),
    ("trtllm", swap("[0, 1, 2, 0, 2, 3]", "&a [0, 1]"), r"line 2: has an anchor, an alias or a tag; write"),
    ("trtllm", swap("num_slots: 6", "num_slots: [[[[[6]]]]]"), r"line 4: is nested too deeply"),
    ("trtllm", lambda _: b"num_slots: " + b"[" * 1_000_000, r"line 1: (is nested too deeply|exceeded max)"),
    ("trtllm", swap("num_slots", "---\nnum_slots"), r"holds more than one YAML document; keep the first"),
    ("trtllm", swap("num_slots", "\x00num_slots"), r"is not YAML \(.*\); give the file whole"),
    ("eplb", lambda content: content[:-8], r"is no safetensors file of integers \(.*\); save what"),
    ("eplb", swap('"shape":[2,6]', '"shape":[2,9]'), r"is no safetensors file of integers"),
    ("eplb", tensors(expert_count=None), r"has no key 'expert_count'; add it"),
    ("eplb", tensors(x=np.zeros(1)), r"unknown key 'x'; keep"),
    ("eplb", tensors(expert_count=np.zeros((2, 4))), r"expert_count: is float64; give integers"),
    ("eplb", tensors(physical_to_logical_map=np.ones((2, 6), bool)), r"_map: is bool; give integers"),
    ("eplb", tensors(expert_count=np.ones((2, 4), np.int64)), r"expert_count: does not say the same as phys"),
    *(
        ("eplb", tensors(logical_to_physical_map=physical), r"logical_to_physical_map: does not say the same")
        for physical in (
            np.ones((2, 4, 2), np.int64),
            np.array(0),
            np.ones((2, 4, 0), np.int64),
            np.array([[0, 1, 2, 5], [2, 3, 0, 0]]),  # a replica of each alone
            np.array([[[0], [1], [2], [5]], [[2], [3], [4], [5]]]),
            EPLB_SLOTS[:, ::-1].copy(),  # of other experts
            EPLB_SLOTS[:1],
            np.where(EPLB_SLOTS == 3, 0, EPLB_SLOTS),  # one twice, one not at all
            np.where(EPLB_SLOTS == 3, -1, EPLB_SLOTS),
            np.where(EPLB_SLOTS == -1, 4, EPLB_SLOTS),  # one too many
            np.where(EPLB_SLOTS == -1, -2, EPLB_SLOTS),
            np.where(EPLB_SLOTS == -1, 6, EPLB_SLOTS),
        )
    ),
    ("eplb", tensors(physical_to_logical_map=np.zeros((3, 6), np.int64)), r"shape \(3, 6\), or negative ids"),
    ("eplb", tensors(physical_to_logical_map=np.full((2, 6), -1)), r"shape \(2, 6\), or negative ids; give"),
    (
        "eplb",
        tensors(physical_to_logical_map=np.full((2, 6), 1 << 40)),
        r"layer 1: holds expert 1099511627776",
    ),
    ("exflow", swap("0,0\r\n", ""), r"does not place expert 0 of 0..7; give the file whole"),
    ("exflow", swap("0,0\r\n", "0,0\r\n0,1\r\n"), r"line 3: places expert 0 on 1; the model has 8 experts"),
    ("exflow", swap("7,0", "8,0"), r"line 9: places expert 8 on 0; the model has 8 experts in all, place"),
    ("exflow", swap("7,0", "7,999999999"), r"line 9: places expert 7 on 999999999"),
    ("exflow", swap("7,0", "7,1"), r"MoE layer 1: node 0 of 2 has 1 of 4 experts, in a plan every GPU has"),
    ("exflow", swap("7,0", "7,-1"), r"line 9: is \['7', '-1'\]; give two numbers from 0 up"),
    ("exflow", swap("7,0", "7"), r"line 9: is \['7'\]; give two numbers"),
    ("exflow", swap("Expert,Node\r\n", ""), r"is \['0', '0'\]; give the columns Expert,Node"),
    ("exflow", swap("7,0", '7,"' + "0" * 200_000), r"is no CSV file \(field larger than field limit"),
]


@pytest.mark.parametrize(("format", "edit", "message"), MALFORMED)
def test_malformed(format: str, edit: Edit, message: str, golden_trace: RoutingTrace, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_bytes(edit((GOLDEN / FILES[format]).read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_plan(path, format, trace=golden_trace, topology=Topology(gpus_per_node=2))
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_an_input_error_or_another_plan(
    format: str, data: st.DataObject, golden_trace: RoutingTrace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray((GOLDEN / FILES[format]).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    for name in (format, None):
        try:
            read_plan(path, name, trace=golden_trace, topology=Topology(gpus_per_node=2))
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_in_disguise(
    format: str | None, protocol: int, golden_trace: RoutingTrace, tmp_path: Path
) -> None:
    mark = tmp_path / "exploded"
    path = tmp_path / "map.json"
    path.write_bytes(pickle.dumps({"physical_to_logical_map": Payload(mark)}, protocol))
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        read_plan(path, format, trace=golden_trace, topology=Topology(gpus_per_node=2))
    assert not mark.exists()
    if protocol and format != "eplb":
        assert "is a pickle or a .pt archive, which is never loaded; save" in str(caught.value)


def test_yaml_that_would_run_code(golden_trace: RoutingTrace, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    path = tmp_path / "map.yaml"
    path.write_text(f"num_slots: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(InputError, match=r"map\.yaml: line 1: has an anchor, an alias or a tag; write"):
        read_plan(path, trace=golden_trace)
    assert not mark.exists()


def test_files_that_are_none(
    golden_trace: RoutingTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content, message in (
        (b"", "begins with '', no format known here; give the format, one of eplb, sglang, "),
        (b"hello", "begins with 'hello', no format known here"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_plan(tmp_path / "a", trace=golden_trace)
    with pytest.raises(InputError, match=r"none: cannot be read \(No such file or directory\); give"):
        read_plan(tmp_path / "none", trace=golden_trace)
    with pytest.raises(InputError, match=r"format 'pt' is not known; give one of eplb, "):
        read_plan(tmp_path / "a", "pt", trace=golden_trace)
    monkeypatch.setattr(registry, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="has 43 bytes, a placement 10 at most; give another file"):
        read_plan(golden("vllm", tmp_path), trace=golden_trace)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"tiny"',
            "7",
            "model = 7: .*; export the plan again, or remove the file and import with",
        ),
        ('"model": "tiny",', "", "the key 'model' is missing; export the plan again"),
        ('"method"', '"x": 1, "method"', "unknown key 'x'; export the plan again"),
        ("[1, 3]", "[3, 1]", r"moe_layer_ids: are \[3, 1\]; give ascending hidden-layer indices"),
        ("[1, 3]", "[1, 4]", "moe_layer_ids: layer 4 is not among 4 hidden layers"),
        ("[4, 4]", "[4]", "experts_per_layer: has 1 entries for 2 MoE layers"),
        (
            '"num_experts": 4',
            '"num_experts": 99999999999',
            "num_experts: is 99999999999; give a number from 1",
        ),
        ('"link_cost": null', '"link_cost": [[0]]', "topology: link_cost is not 2 rows of 2"),
        ("{", "", "is not valid JSON"),
    ],
)
def test_a_damaged_sidecar(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = golden("vllm", tmp_path)
    text = (GOLDEN / "sidecar.meta.json").read_text()
    assert old in text
    sidecar_path(path).write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        read_plan(path)
    assert str(caught.value).startswith(str(sidecar_path(path)))
    assert "\n" not in str(caught.value)


def test_a_sidecar_of_another_placement(tmp_path: Path) -> None:
    path = golden("vllm", tmp_path)
    sidecar = json.loads((GOLDEN / "sidecar.meta.json").read_text())
    sidecar |= {"moe_layer_ids": [1], "experts_per_layer": [4]}
    sidecar_path(path).write_text(json.dumps(sidecar))
    with pytest.raises(InputError, match="the list: has 2 entries instead of 1; give one for each MoE layer"):
        read_plan(path)
