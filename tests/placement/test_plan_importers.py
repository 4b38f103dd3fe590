"""Other engines' placements as plans: what is exported comes back, and what is damaged gets one line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.placement.formats.exporters.registry import export_plan
from exflow.placement.formats.exporters.sidecar import sidecar_path
from exflow.placement.formats.importers.registry import FORMATS, read_plan
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import OWNED
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from tests.placement.golden_plans import FILES, GOLDEN, golden

SLOTS = {name: [[0, 1, 2, 0, 2, 3], [3, 2, 0, 1, 2, 3]] for name in FILES} | {
    "exflow": [[0, 2, 1, 3], [1, 3, 0, 2]]
}


@st.composite
def plans(draw: st.DrawFn, replicas: bool = True, unequal: bool = False) -> Plan:
    """Any plan of a small model; the rest of its slots are drawn at will."""
    topology = Topology(num_nodes=draw(st.integers(1, 3)), gpus_per_node=draw(st.integers(1, 3)))
    ranks = topology.num_ranks
    if replicas:
        most = draw(st.integers(1, 9))
        num_slots = (-(-most // ranks) + draw(st.integers(0, 2))) * ranks
    else:
        most = num_slots = ranks * draw(st.integers(1, 3))
    ids = sorted(draw(st.sets(st.integers(0, 7), min_size=1, max_size=3)))
    counts = [most] * len(ids)
    if unequal and len(ids) > 1:
        counts[0] = draw(st.integers(1, most))
    rows = []
    for count in counts:
        extra = st.lists(st.integers(0, count - 1), min_size=num_slots - count, max_size=num_slots - count)
        rows.append(draw(st.permutations([*range(count), *draw(extra)])))
    return Plan(
        model=draw(st.text(max_size=8)),
        num_hidden_layers=ids[-1] + 1 + draw(st.integers(0, 2)),
        moe_layer_ids=tuple(ids),
        num_experts=most,
        experts_per_layer=tuple(counts),
        topology=topology,
        physical_to_logical_map=np.array(rows),
        next_owner=None,
        strategy=draw(st.sampled_from(OWNED)),
        method="drawn",
    )


def assert_same(plan: Plan, other: Plan) -> None:
    for name in vars(plan):
        ours, theirs = getattr(plan, name), getattr(other, name)
        assert np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs, name


@pytest.mark.parametrize("format", ["sglang", "trtllm", "vllm", "eplb"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_exported_comes_back(
    format: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = data.draw(plans(unequal=format == "trtllm"))
    path = tmp_path_factory.getbasetemp() / FILES[format]
    export_plan(plan, format, path)
    assert_same(plan, read_plan(path))


@given(plan=plans())
@settings(max_examples=40, deadline=None)
def test_vllm_ascend_comes_back_or_is_refused(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    by_rank = plan.physical_to_logical_map.reshape(plan.num_layers, plan.num_ranks, -1)
    path = tmp_path_factory.getbasetemp() / "ascend.json"
    if any(len(set(rank)) < len(rank) for layer in by_rank.tolist() for rank in layer):
        with pytest.raises(InputError, match="twice"):
            export_plan(plan, "vllm-ascend", path)
    else:
        export_plan(plan, "vllm-ascend", path)
        assert_same(plan, read_plan(path))


@given(plan=plans(replicas=False))
@settings(max_examples=40, deadline=None)
def test_the_csv_comes_back_with_each_ranks_experts_in_order(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "exflow.csv"
    export_plan(plan, "exflow", path)
    by_rank = plan.physical_to_logical_map.reshape(plan.num_layers, plan.num_ranks, -1)
    ordered = np.sort(by_rank, axis=2).reshape(plan.num_layers, -1)
    assert_same(replace(plan, physical_to_logical_map=ordered), read_plan(path))


def test_costs_of_links_come_back(tmp_path: Path, golden_trace: RoutingTrace) -> None:
    cost = ((0.0, 1.5), (1.5, 0.0))
    plan = read_plan(
        golden("vllm", tmp_path), trace=golden_trace, topology=Topology(gpus_per_node=2, link_cost=cost)
    )
    export_plan(plan, "vllm", tmp_path / "again.json")
    assert read_plan(tmp_path / "again.json").topology.link_cost == cost


@pytest.mark.parametrize("format", FORMATS)
def test_golden_files_by_their_content(format: str, golden_trace: RoutingTrace, tmp_path: Path) -> None:
    path = golden(format, tmp_path)
    plan = read_plan(path, trace=golden_trace, topology=Topology(gpus_per_node=2))
    assert plan.physical_to_logical_map.tolist() == SLOTS[format]
    assert (plan.model, plan.num_hidden_layers, plan.moe_layer_ids) == ("tiny", 4, (1, 3))
    assert (plan.method, plan.strategy) == (f"imported from {format}", "dispatch-combine")
    assert plan.trace_digest == golden_trace.digest()
    assert plan.next_owner is not None
    assert plan.expected["strategies"]["dispatch_combine"]["messages_per_token_layer"] > 0
    assert_same(plan, read_plan(path, format, trace=golden_trace, topology=Topology(gpus_per_node=2)))


@pytest.mark.parametrize("format", ["vllm-ascend", "exflow"])
def test_files_that_say_the_ranks(format: str, golden_trace: RoutingTrace, tmp_path: Path) -> None:
    path = golden(format, tmp_path)
    assert read_plan(path, trace=golden_trace).topology == Topology(gpus_per_node=2)
    with pytest.raises(InputError, match=r"places experts on 2 GPUs, not on 4 ranks \(2 nodes of 2\); give"):
        read_plan(path, trace=golden_trace, topology=Topology(num_nodes=2, gpus_per_node=2))


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_says_the_model_or_the_ranks(format: str, golden_trace: RoutingTrace, tmp_path: Path) -> None:
    path = golden(format, tmp_path)
    with pytest.raises(InputError, match=r"no placement\.meta\.json beside it; give a trace of"):
        read_plan(path, topology=Topology(gpus_per_node=2))
    if format not in ("vllm-ascend", "exflow"):
        with pytest.raises(InputError, match=r"number of GPUs, and there is no .*; give it, or the topology"):
            read_plan(path, trace=golden_trace)


def test_what_is_given_goes_before_the_sidecar(golden_trace: RoutingTrace, tmp_path: Path) -> None:
    path = golden("vllm", tmp_path)
    sidecar_path(path).write_bytes((GOLDEN / "sidecar.meta.json").read_bytes())
    assert read_plan(path).topology == Topology(num_nodes=2, gpus_per_node=1)
    assert read_plan(path, topology=Topology(gpus_per_node=3)).num_ranks == 3
    assert read_plan(path, trace=replace(golden_trace, model="other")).model == "other"


def test_one_row_for_all_layers(golden_trace: RoutingTrace, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text("[0, 1, 2, 3, 0, 1]")
    plan = read_plan(path, trace=golden_trace, topology=Topology(gpus_per_node=2))
    assert plan.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_csv_rows_in_any_order(golden_trace: RoutingTrace, tmp_path: Path) -> None:
    header, *rows = (GOLDEN / "exflow.csv").read_text().splitlines()
    path = tmp_path / "a.csv"
    path.write_text("\n".join([header, *reversed(rows)]))
    assert read_plan(path, trace=golden_trace).physical_to_logical_map.tolist() == SLOTS["exflow"]
