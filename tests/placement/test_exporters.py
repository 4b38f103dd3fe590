"""Plans in other engines' formats: the files byte for byte (golden/), and what a format cannot express."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.formats.exporters.registry import FORMATS, export_plan
from exflow.placement.formats.exporters.sidecar import sidecar_path
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from tests.placement.golden_plans import FILES, GOLDEN


def tiny(*rows: list[int], experts_per_layer: tuple[int, ...] = (4, 4)) -> Plan:
    """The second and the fourth of four hidden layers have four experts, on one GPU of each of two nodes."""
    return Plan(
        model="tiny",
        num_hidden_layers=4,
        moe_layer_ids=(1, 3),
        num_experts=4,
        experts_per_layer=experts_per_layer,
        topology=Topology(num_nodes=2, gpus_per_node=1),
        physical_to_logical_map=np.array(rows),
        next_owner=None,
        strategy="dispatch-combine",
        method="by hand",
    )


WITH_REPLICAS = tiny([0, 1, 2, 0, 2, 3], [3, 2, 0, 1, 2, 3])
WITHOUT = tiny([0, 2, 1, 3], [1, 3, 0, 2])


@pytest.mark.parametrize("format", FORMATS)
def test_golden_files(format: str, tmp_path: Path) -> None:
    path = tmp_path / FILES[format]
    done = export_plan(WITHOUT if format == "exflow" else WITH_REPLICAS, format, path)
    assert (done.format, done.path, done.sidecar) == (format, path, sidecar_path(path))
    assert path.read_bytes() == (GOLDEN / FILES[format]).read_bytes()
    assert done.sidecar.read_bytes() == (GOLDEN / "sidecar.meta.json").read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([path, done.sidecar])


def test_two_formats_of_one_stem_have_a_sidecar_each() -> None:
    assert sidecar_path(Path("out/map.json")) == Path("out/map.json.meta.json")
    assert sidecar_path(Path("out/map.yaml")) == Path("out/map.yaml.meta.json")


def test_sglang_dense_layers_are_as_the_engine_has_them_by_default() -> None:
    rows = json.loads(FORMATS["sglang"].write(WITH_REPLICAS))["physical_to_logical_map"]
    assert rows[0] == rows[2] == [0, 1, 2, 3, 0, 1]
    assert [rows[1], rows[3]] == WITH_REPLICAS.physical_to_logical_map.tolist()


@pytest.mark.parametrize("format", ["sglang", "vllm-ascend", "vllm", "eplb", "exflow"])
def test_layers_of_unequal_size(format: str, tmp_path: Path) -> None:
    plan = tiny([0, 1, 2, 3], [0, 1, 2, 0], experts_per_layer=(4, 3))
    with pytest.raises(InputError, match=r"^MoE layer 1 has 3 experts, others 4, .*; only the format trtllm"):
        export_plan(plan, format, tmp_path / FILES[format])
    assert not list(tmp_path.iterdir())
    assert b"\n  3: [0, 1, 2, 0]\n" in FORMATS["trtllm"].write(plan)


def test_replicas_in_the_csv(tmp_path: Path) -> None:
    message = r"^the plan has 2 slots a layer for replicas, .*; place again without redundant experts$"
    with pytest.raises(InputError, match=message):
        export_plan(WITH_REPLICAS, "exflow", tmp_path / "a.csv")


def test_an_expert_twice_on_a_device_of_vllm_ascend(tmp_path: Path) -> None:
    plan = tiny([0, 1, 2, 0, 2, 3], [0, 1, 2, 1, 3, 3])
    message = r"^MoE layer 1: rank 1 holds expert 3 twice, .*; place again with fewer redundant experts$"
    with pytest.raises(InputError, match=message):
        export_plan(plan, "vllm-ascend", tmp_path / "a.json")


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^format 'pt' is not known; give one of sglang, trtllm, "):
        export_plan(WITHOUT, "pt", tmp_path / "a.pt")
    for format in ("sglang", "vllm-ascend"):
        with pytest.raises(InputError, match=rf"a\.txt: {format} reads only files that end in \.json; name"):
            export_plan(WITHOUT, format, tmp_path / "a.txt")
    with pytest.raises(InputError, match="cannot be written"):
        export_plan(WITHOUT, "vllm", Path("/proc/none/a.json"))


@pytest.mark.parametrize("format", FORMATS)
def test_usage_names_the_file_and_a_trap(format: str, tmp_path: Path) -> None:
    path = tmp_path / FILES[format]
    usage = FORMATS[format].usage(WITHOUT, path)
    assert str(path) in "\n".join(usage.options)
    assert usage.traps
    assert all(line and "\n" not in line for line in (*usage.options, *usage.traps))


def test_usage_says_how_many_experts_are_redundant() -> None:
    path = Path("map.json")
    assert "--ep-num-redundant-experts 2" in FORMATS["sglang"].usage(WITH_REPLICAS, path).options
    assert not any("redundant" in line for line in FORMATS["sglang"].usage(WITHOUT, path).options)
    (config,) = (line for line in FORMATS["vllm"].usage(WITH_REPLICAS, path).options if "config" in line)
    assert json.loads(config.split("'")[1]) == {
        "num_redundant_experts": 2,
        "initial_expert_map_path": "map.json",
    }


def test_a_plan_of_numpy_integers_is_exported_alike() -> None:
    small = replace(WITHOUT, physical_to_logical_map=WITHOUT.physical_to_logical_map.astype(np.uint16))
    for format in FORMATS.values():
        assert format.write(small) == format.write(WITHOUT)


def test_exporting_needs_no_solver() -> None:
    heavy = {"torch", "numba", "pulp", "highspy"}
    code = f"import exflow.commands.export, sys; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
