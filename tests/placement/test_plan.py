"""The plan: its file (docs/plan-format.md), and what a reader says of a file that is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import STRATEGIES
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import count_traffic, local_fraction
from exflow.profiling.trace import RoutingTrace

SLOTS = np.array([[0, 1, 2, 0, 2, 3], [0, 2, 3, 1, 2, 3]])  # of the example in the docs
DOCS = Path(__file__).parents[2] / "docs" / "plan-format.md"
AGAIN = "make the plan again with exflow place"


@pytest.fixture(scope="module")
def example() -> str:
    """The file in the docs."""
    return DOCS.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]


@pytest.fixture
def plan(example: str, tmp_path: Path) -> Plan:
    path = tmp_path / "plan.json"
    path.write_text(example, encoding="utf-8")
    return Plan.load(path)


@pytest.fixture
def trace() -> RoutingTrace:
    """The trace in the docs."""
    experts = [[0, 2], [0, 3], [1, 2], [2, 0]]
    return RoutingTrace.from_arrays(experts, num_experts=4, moe_layer_ids=[1, 2], model="tiny")


def test_the_example_in_the_docs_reads_as_it_says(plan: Plan) -> None:
    assert (plan.num_layers, plan.num_experts, plan.num_ranks) == (2, 4, 2)
    assert (plan.num_slots, plan.slots_per_rank) == (6, 3)
    assert (plan.num_hidden_layers, plan.moe_layer_ids, plan.experts_per_layer) == (3, (1, 2), (4, 4))
    assert plan.topology == Topology(num_nodes=1, gpus_per_node=2)
    assert plan.rank_of_expert.tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert plan.hosts[0].tolist() == [[True, True], [True, False], [True, True], [False, True]]
    assert plan.serving_slot[:, 0].tolist() == [[0, 1, 2, 5], [3, 1, 4, 5]]
    assert plan.next_owner is not None
    assert plan.next_owner[0, 2].tolist() == [1000, 0]
    assert plan.optimal
    assert plan.gap == 0


def test_the_example_in_the_docs_is_made_from_its_trace(
    example: str, trace: RoutingTrace, tmp_path: Path
) -> None:
    plan = Plan.of_slots(
        SLOTS[:, [2, 0, 1, 3, 4, 5]],  # a rank's experts are put in order
        Topology(gpus_per_node=2),
        trace,
        method="by hand",
        objective=0.0,
        lower_bound=0.0,
        optimal=True,
        expected={"local_fraction": 1.0},
    )
    assert plan.trace_digest == trace.digest()
    assert count_traffic(trace, plan, 2).messages == count_traffic(trace, plan, 1).messages == 0
    assert local_fraction(trace, plan).tolist() == [1.0]
    replace(plan, trace_digest="").save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == example


def test_what_is_not_in_the_example_survives_the_file(plan: Plan, tmp_path: Path) -> None:
    """Links, layers of unequal size, another strategy."""
    costs = ((0.0, 2.5), (2.5, 0.0))
    uneven = replace(
        plan,
        topology=Topology(num_nodes=2, gpus_per_node=1, link_cost=costs),
        experts_per_layer=(4, 3),
        physical_to_logical_map=np.array([[0, 1, 2, 0, 2, 3], [0, 2, 2, 1, 1, 2]]),
        strategy="node-coherent",
    )
    uneven.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.topology == uneven.topology
    assert (loaded.experts_per_layer, loaded.strategy) == ((4, 3), "node-coherent")
    assert loaded.physical_to_logical_map.tolist() == uneven.physical_to_logical_map.tolist()
    assert loaded.rank_of_expert.tolist() == [[0, 0, 0, 1], [0, 1, 0, -1]]
    assert loaded.serving_slot[:, 1].tolist() == [[0, 3, 1, -1], [0, 3, 5, -1]]
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_group_is_that_of_the_strategy(plan: Plan) -> None:
    four = replace(
        plan,
        topology=Topology(num_nodes=2, gpus_per_node=2),
        physical_to_logical_map=np.arange(8).reshape(1, 8).repeat(2, axis=0) % 4,
        next_owner=None,
    )
    sizes = {strategy: replace(four, strategy=strategy).group_size for strategy in STRATEGIES}
    assert sizes == {"coherent": 4, "node-coherent": 2, "dispatch-combine": 1}


def test_saving_what_was_loaded_changes_no_byte(plan: Plan, example: str, tmp_path: Path) -> None:
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == example


def test_a_plan_without_what_is_optional(plan: Plan, tmp_path: Path) -> None:
    bare = replace(plan, next_owner=None, objective=None, lower_bound=None, optimal=False, expected={})
    bare.save(tmp_path / "bare.json")
    loaded = Plan.load(tmp_path / "bare.json")
    assert (loaded.next_owner, loaded.objective, loaded.lower_bound, loaded.gap) == (None, None, None, None)
    assert not loaded.optimal


def test_the_numbers_of_a_solver_are_saved_whatever_their_type(plan: Plan, tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"objective": np.int64(8), "lower_bound": np.float32(6), "optimal": np.bool_(0)}
    replace(plan, **numbers).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").gap == 0.25


def test_the_experts_of_a_rank_are_in_ascending_order(trace: RoutingTrace) -> None:
    plan = Plan.from_ranks(
        np.array([[1, 0, 1, 0], [0, 1, 1, 0]]), Topology(gpus_per_node=2), trace, method=""
    )
    assert plan.physical_to_logical_map.tolist() == [[1, 3, 0, 2], [0, 3, 1, 2]]
    assert plan.rank_of_expert.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (
            [[0, 0, 1, 1], [0, 1, 1, 1]],
            "rank_of_expert[1]: gives the ranks [1, 3] of 4 experts; "
            "give each of the 2 ranks the same number",
        ),
        (
            [[0, 0, 1, 2], [0, 0, 1, 1]],
            "rank_of_expert[0]: gives the ranks [2, 1] of 4 experts; "
            "give each of the 2 ranks the same number",
        ),
        (
            [[0, 0, 1, 1]],
            "rank_of_expert: has the shape (1, 4) instead of (2, 4); place again on this trace",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused(trace: RoutingTrace, ranks: list[list[int]], message: str) -> None:
    with pytest.raises(InputError) as error:
        Plan.from_ranks(np.array(ranks), Topology(gpus_per_node=2), trace, method="")
    assert str(error.value) == message


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [[0, 1, 2, 3, 0]] * 2])
def test_slots_that_the_ranks_cannot_share_are_refused(trace: RoutingTrace, slots: list[Any]) -> None:
    with pytest.raises(InputError) as error:
        Plan.of_slots(np.array(slots), Topology(gpus_per_node=2), trace, method="")
    assert str(error.value) == (
        f"physical_to_logical_map: has the shape {np.shape(slots)}; give [layers, slots], and a multiple of "
        "2 slots"
    )


def test_layers_of_unequal_size_are_those_of_the_trace() -> None:
    trace = RoutingTrace.from_arrays([[3, 1], [0, 2]], num_experts=4, experts_per_layer=[4, 3])
    slots = np.array([[0, 1, 2, 3], [1, 0, 2, 2]])
    plan = Plan.of_slots(slots, Topology(gpus_per_node=2), trace, method="")
    assert plan.experts_per_layer == (4, 3)
    assert plan.next_owner is not None
    assert plan.next_owner.tolist() == [
        [[0, 1000], [0, 0], [0, 0], [1000, 0]],
        [[0, 0], [1000, 0], [0, 0], [0, 0]],
    ]
    plan.check_trace(trace)


def test_ranks_may_have_further_knowledge(trace: RoutingTrace) -> None:
    plan = Plan.from_ranks(
        np.array([[0, 0, 1, 1]] * 2),
        Topology(gpus_per_node=2),
        trace,
        method="",
        strategy="dispatch-combine",
        objective=2.0,
        lower_bound=1.0,
    )
    assert (plan.strategy, plan.gap) == ("dispatch-combine", 0.5)


def put(*place: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of the document: `put("topology", "num_nodes", 0)` sets document["topology"]["num_nodes"]."""
    *path, key, value = place

    def edit(document: Any) -> None:
        for step in path:
            document = document[step]
        document[key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("format", "exflow-trace"), f'is not a plan (no "format": "exflow-plan"); {AGAIN}'),
        (put("version", 1), f"version is 1, this exflow reads version 2; {AGAIN}"),
        (lambda document: document.pop("version"), f"version is None, this exflow reads version 2; {AGAIN}"),
        (lambda document: document.pop("method"), f"the key 'method' is missing; {AGAIN}"),
        (
            lambda document: document["topology"].pop("link_cost"),
            f"the key 'topology.link_cost' is missing; {AGAIN}",
        ),
        (put("colour", "red"), f"unknown key 'colour'; {AGAIN}"),
        (put("topology", "racks", 2), f"unknown key 'topology.racks'; {AGAIN}"),
        (
            put("topology", "gpus_per_node", 0),
            f"topology.gpus_per_node = 0: Input should be greater than or equal to 1; {AGAIN}",
        ),
        (put("num_experts", 4.0), f"num_experts = 4.0: Input should be a valid integer; {AGAIN}"),
        (put("optimal", 1), f"optimal = 1: Input should be a valid boolean; {AGAIN}"),
        (put("objective", float("nan")), f"objective = nan: Input should be a finite number; {AGAIN}"),
        (
            put("strategy", "replicated"),
            "strategy = 'replicated': Input should be 'coherent', 'node-coherent' or 'dispatch-combine'; "
            f"{AGAIN}",
        ),
        (
            put("topology", "link_cost", [[0, "1"], [1, 0]]),
            f"topology.link_cost[0][1] = '1': Input should be a valid number; {AGAIN}",
        ),
        (
            put("topology", "link_cost", [[0, 1, 1]] * 2),
            "topology: link_cost is not 2 rows of 2; give one for each rank",
        ),
        (
            put("topology", "link_cost", [[0, 2], [1, 0]]),
            "topology: link_cost[0][1] is 2.0, but 1.0 the other way; give both ways the same cost",
        ),
        (put("experts_per_layer", [4]), f"experts_per_layer: has 1 entries instead of 2; {AGAIN}"),
        (put("experts_per_layer", []), f"experts_per_layer: has 0 entries instead of 2; {AGAIN}"),
        (
            put("experts_per_layer", 1, 0),
            f"experts_per_layer[1] = 0: Input should be greater than or equal to 1; {AGAIN}",
        ),
        (
            put("experts_per_layer", 1, 1 << 64),
            "experts_per_layer[1] = 18446744073709551616: Input should be less than 9223372036854775808; "
            f"{AGAIN}",
        ),
        (
            put("experts_per_layer", [4, 5]),
            "experts_per_layer: is [4, 5]; "
            "give a number for each of the 2 MoE layers, 4 at most and at least once",
        ),
        (
            put("experts_per_layer", [3, 3]),
            "experts_per_layer: is [3, 3]; "
            "give a number for each of the 2 MoE layers, 4 at most and at least once",
        ),
        (
            put("experts_per_layer", [3, 4]),
            "physical_to_logical_map[0]: holds expert 3, but the layer has 3; place 0..2",
        ),
        (put("model", None), f"model = None: Input should be a valid string; {AGAIN}"),
        (
            put("moe_layer_ids", 1, "2"),
            f"moe_layer_ids[1] = '2': Input should be a valid integer; {AGAIN}",
        ),
        (put("topology", "num_nodes", 2), f"next_owner[0][0]: has 2 entries instead of 4; {AGAIN}"),
        (
            put("moe_layer_ids", [2, 1]),
            "moe_layer_ids: are [2, 1] in a model of 3 hidden layers; "
            "give ascending indices of hidden layers, at least one",
        ),
        (
            put("num_hidden_layers", 2),
            "moe_layer_ids: are [1, 2] in a model of 2 hidden layers; "
            "give ascending indices of hidden layers, at least one",
        ),
        (put("moe_layer_ids", [0, 1, 2]), f"experts_per_layer: has 2 entries instead of 3; {AGAIN}"),
        (
            lambda document: document["physical_to_logical_map"].pop(),
            f"physical_to_logical_map: has 1 entries instead of 2; {AGAIN}",
        ),
        (
            put("physical_to_logical_map", 1, [0, 1, 2, 3, 2]),
            f"physical_to_logical_map[1]: has 5 entries instead of 6; {AGAIN}",
        ),
        (
            put("physical_to_logical_map", [[0, 1, 2, 3, 3]] * 2),
            "physical_to_logical_map: 5 slots cannot be shared equally by 2 ranks (1 node of 2); "
            "choose a number of ranks that divides it",
        ),
        (
            put("physical_to_logical_map", [[], []]),
            "physical_to_logical_map: has the shape (2, 0) instead of (2, 1); place again on this trace",
        ),
        (
            put("physical_to_logical_map", 1, [2, 3, 3, 1, 1, 2]),
            "physical_to_logical_map[1]: does not hold expert 0; place each of 0..3",
        ),
        (
            put("physical_to_logical_map", 0, 3, 9),
            "physical_to_logical_map[0]: holds expert 9, but the layer has 4; place 0..3",
        ),
        (put("next_owner", 0, 1, [1000]), f"next_owner[0][1]: has 1 entries instead of 2; {AGAIN}"),
        (
            put("next_owner", 0, 1, 1, 1001),
            f"next_owner[0][1][1] = 1001: Input should be less than or equal to 1000; {AGAIN}",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    example: str, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = json.loads(example)
    edit(document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError) as error:
        Plan.load(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_missing_or_truncated_file_is_refused(example: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match=f"plan.json: no such plan; {AGAIN}"):
        Plan.load(path)
    path.write_text(example[:100], encoding="utf-8")
    with pytest.raises(InputError, match=f"plan.json: the plan is not valid JSON .*; {AGAIN}"):
        Plan.load(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r'is not a plan \(no "format": "exflow-plan"\);'):
        Plan.load(path)


def test_ranks_that_cannot_share_the_slots_equally_are_refused(plan: Plan) -> None:
    with pytest.raises(InputError) as error:
        replace(plan, topology=Topology(gpus_per_node=4))
    assert str(error.value) == (
        "physical_to_logical_map: 6 slots cannot be shared equally by 4 ranks (1 node of 4); "
        "choose a number of ranks that divides it"
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            np.zeros((2, 4, 3), dtype=np.int16),
            "next_owner: has the shape (2, 4, 3) instead of (2, 4, 2); place again on this trace",
        ),
        (np.full((2, 4, 2), -1), "next_owner: holds values outside 0..1000; give per mille"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(plan: Plan, table: np.ndarray, message: str) -> None:
    with pytest.raises(InputError) as error:
        replace(plan, next_owner=table)
    assert str(error.value) == message


def test_a_plan_fits_its_model(plan: Plan) -> None:
    plan.check_model(num_experts=4, moe_layer_ids=[1, 2], num_ranks=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ((8, (1, 2), 2), "the plan is for 4 experts a layer, the model has 8; "),
        ((4, (0, 1, 2), 2), "the plan is for 2 MoE layers, the model has 3; "),
        ((4, (0, 2), 2), "the plan is for [1, 2] as moe_layer_ids, the model has [0, 2]; "),
    ],
)
def test_another_model_is_refused(plan: Plan, model: tuple[int, tuple[int, ...], int], message: str) -> None:
    with pytest.raises(InputError) as error:
        plan.check_model(*model)
    assert str(error.value) == message + "use a plan that was placed on a trace of this model"


def test_a_model_with_layers_of_another_size_is_refused(plan: Plan, trace: RoutingTrace) -> None:
    slots = np.array([[0, 1, 2, 0, 2, 3], [0, 2, 2, 1, 1, 2]])
    uneven = replace(plan, experts_per_layer=(4, 3), physical_to_logical_map=slots)
    fault = (
        "the plan is for 3 experts in MoE layer 1, {} has 4; "
        "use a plan that was placed on a trace of this model"
    )
    with pytest.raises(InputError) as error:
        uneven.check_model(num_experts=4, moe_layer_ids=[1, 2], num_ranks=2)
    assert str(error.value) == fault.format("the model")
    with pytest.raises(InputError) as error:
        uneven.check_trace(trace)
    assert str(error.value) == fault.format("the trace")


def test_another_number_of_ranks_is_refused(plan: Plan) -> None:
    with pytest.raises(InputError) as error:
        plan.check_model(num_experts=4, moe_layer_ids=[1, 2], num_ranks=4)
    assert str(error.value) == (
        "the plan is for 2 ranks (1 node of 2), launched with 4; start 2 processes, or place again for 4"
    )


def test_loading_a_plan_needs_neither_compiler_nor_torch() -> None:
    check = "import sys, exflow.placement.plan.plan; assert not {'numba', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True)
