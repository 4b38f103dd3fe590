"""The plan: its file (docs/plan-format.md), and what a reader says of a file that is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.replicas import ReplicaRule
from exflow.placement.plan.strategy import OWNED
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import count_traffic, local_fraction
from exflow.profiling.trace import RoutingTrace

SLOTS = np.array([[0, 1, 2, 0, 2, 3], [0, 2, 3, 1, 2, 3]])  # of the example in the docs
DOCS = Path(__file__).parents[2] / "docs" / "plan-format.md"


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


def test_a_table_says_which_replica_serves(plan: Plan, tmp_path: Path) -> None:
    """Rank 0 sends its tokens to rank 1 for expert 0 of the first layer, though it holds a replica."""
    by_rule = plan.serving_slot // plan.slots_per_rank
    table = by_rule.transpose(1, 2, 0).copy()
    table[0, 0] = [1, 0]
    tabled = replace(plan, serving_rank=table)
    assert tabled.serving_slot[:, 0, 0].tolist() == [3, 0]
    tabled.save(tmp_path / "plan.json")
    assert np.array_equal(Plan.load(tmp_path / "plan.json").serving_slot, tabled.serving_slot)
    assert tabled.serving_slots(ReplicaRule.NEAREST)[0, :, 0, 0].tolist() == [0, 3]
    table[0, 1] = [1, 1]
    with pytest.raises(InputError, match=r"serving_rank\[0\]\[1\]\[0\]: is 1, a rank without expert 1"):
        replace(plan, serving_rank=table)


def test_a_plan_of_version_2_loads(example: str, plan: Plan, tmp_path: Path) -> None:
    old = json.loads(example)
    del old["serving_rank"]
    (tmp_path / "old.json").write_text(json.dumps(old | {"version": 2}))
    loaded = Plan.load(tmp_path / "old.json")
    assert loaded.serving_rank is None
    assert np.array_equal(loaded.physical_to_logical_map, plan.physical_to_logical_map)


def test_a_group_is_that_of_the_strategy(plan: Plan) -> None:
    four = replace(
        plan,
        topology=Topology(num_nodes=2, gpus_per_node=2),
        physical_to_logical_map=np.arange(8).reshape(1, 8).repeat(2, axis=0) % 4,
        next_owner=None,
    )
    sizes = {strategy: replace(four, strategy=strategy).group_size for strategy in OWNED}
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
