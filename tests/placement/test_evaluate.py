import json
from pathlib import Path

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve import baselines
from exflow.placement.traffic.evaluate import evaluate, exchanges_per_step
from exflow.placement.traffic.traffic import count_traffic, follow, imbalance
from exflow.profiling.trace import RoutingTrace

TRACES = Path(__file__).parents[3] / "shared" / "traces"
FIGURES = {
    "messages_per_token_layer",
    "intra_node",
    "inter_node",
    "dispatch",
    "return",
    "kv_copies",
    "kv_intra_node",
    "kv_inter_node",
    "exchanges_per_step",
    "totals",
}
FOLLOWED = FIGURES | {"remote_nodes", "imbalance", "owner_imbalance"}


def contiguous_plan(trace: RoutingTrace, topology: Topology) -> Plan:
    ranks = baselines.contiguous(trace.num_layers, trace.num_experts, topology.num_ranks)
    return Plan.from_ranks(ranks, topology, trace, method="contiguous")


@pytest.fixture
def random_trace() -> RoutingTrace:
    rng = np.random.default_rng(0)
    return RoutingTrace.from_arrays(
        rng.integers(0, 8, (50, 3, 2)), num_experts=8, sequence=rng.integers(0, 5, 50), model="tiny"
    )


def test_one_top_1_token_that_visits_both_ranks() -> None:
    trace = RoutingTrace.from_arrays([[1, 1, 0, 0]], num_experts=2)
    figures = evaluate(contiguous_plan(trace, Topology(gpus_per_node=2)), trace)
    combine, coherent = figures["strategies"]["dispatch_combine"], figures["strategies"]["coherent"]
    assert (combine["dispatch"], combine["return"], combine["messages_per_token_layer"]) == (0.5, 0.5, 1.0)
    assert (coherent["dispatch"], coherent["return"], coherent["messages_per_token_layer"]) == (0.5, 0.0, 0.5)
    assert (combine["kv_copies"], coherent["kv_copies"]) == (0, 1)
    assert (combine["exchanges_per_step"], coherent["exchanges_per_step"]) == (8, 4)
    assert figures["local_fraction"] == pytest.approx(2 / 3)
    assert figures["imbalance"] == {"mean": 2.0, "max": 2.0, "per_layer": [2.0] * 4}
    sizes = {"tokens": 1, "layers": 4, "top_k": 1, "experts": 2, "ranks": 2, "nodes": 1}
    assert sizes.items() <= figures.items()


def test_replicated_sends_no_message_but_reduces_every_layer(random_trace: RoutingTrace) -> None:
    plan = contiguous_plan(random_trace, Topology(gpus_per_node=4))
    replicated = evaluate(plan, random_trace)["strategies"]["replicated"]
    more = {"all_reduces_per_step", "all_reduce_copies", "imbalance", "owner_imbalance"}
    assert set(replicated) == FIGURES | more
    assert replicated["messages_per_token_layer"] == replicated["kv_copies"] == 0
    assert replicated["all_reduces_per_step"] == replicated["exchanges_per_step"] == 3
    assert replicated["all_reduce_copies"] == 6  # each of 4 ranks sends 2 * 3/4 of a row


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_figure_agrees_with_the_count(random_trace: RoutingTrace, nodes: int) -> None:
    plan = contiguous_plan(random_trace, Topology(num_nodes=nodes, gpus_per_node=4 // nodes))
    figures = evaluate(plan, random_trace)
    assert json.loads(json.dumps(figures)) == figures
    group_sizes = {"dispatch_combine": 1, "coherent": 4} | ({"node_coherent": 2} if nodes == 2 else {})
    assert set(figures["strategies"]) == {*group_sizes, "replicated"}
    for name, group_size in group_sizes.items():
        strategy, traffic = figures["strategies"][name], count_traffic(random_trace, plan, group_size)
        assert set(strategy) == FOLLOWED | ({"hierarchical"} if nodes == 2 else set())
        layers = imbalance(random_trace, plan, group_size)
        assert strategy["imbalance"] == {
            "mean": pytest.approx(layers.mean()),
            "max": layers.max(),
            "per_layer": layers.tolist(),
        }
        followed = follow(random_trace, plan, group_size)
        owned = followed.owned.max(axis=1) / followed.owned.mean(axis=1)
        assert strategy["owner_imbalance"]["per_layer"] == owned.tolist()
        remote = followed.remote_nodes.sum()
        assert strategy["remote_nodes"] == remote / (50 * 3) <= strategy["dispatch"]
        assert (nodes == 1) == (remote == 0)
        messages = strategy["messages_per_token_layer"]
        assert messages == pytest.approx(strategy["intra_node"] + strategy["inter_node"])
        assert messages == pytest.approx(strategy["dispatch"] + strategy["return"])
        assert messages == strategy["totals"]["messages"] / (50 * 3) == traffic.messages / (50 * 3)
        assert strategy["kv_copies"] == group_size - 1
        assert all(getattr(traffic, key) == total for key, total in strategy["totals"].items())


@pytest.mark.parametrize("strategy", ["coherent", "node-coherent", "dispatch-combine"])
def test_the_imbalance_beside_them_is_that_of_the_plans_strategy(
    random_trace: RoutingTrace, strategy: Strategy
) -> None:
    slots = np.tile([0, 1, 2, 3, 0, 4, 5, 6, 7, 1, 2, 0], (3, 1))  # three of four ranks have expert 0
    topology = Topology(gpus_per_node=4)
    plan = Plan.of_slots(slots, topology, random_trace, method="", strategy=strategy)
    figures = evaluate(plan, random_trace)
    assert ("node_coherent" in figures["strategies"]) == (strategy == "node-coherent")
    assert figures["slots"] == 12
    assert figures["imbalance"] == figures["strategies"][strategy.replace("-", "_")]["imbalance"]
    assert figures["imbalance"]["per_layer"] == imbalance(random_trace, plan).tolist()


def test_the_second_exchange_is_absent_for_coherent_top_1_alone() -> None:
    assert exchanges_per_step(24, top_k=1, group_size=8, num_ranks=8) == 24
    assert exchanges_per_step(24, top_k=1, group_size=4, num_ranks=8) == 48
    assert exchanges_per_step(24, top_k=2, group_size=8, num_ranks=8) == 48


def test_a_single_moe_layer_has_no_transition_to_lose() -> None:
    trace = RoutingTrace.from_arrays([[1]], num_experts=2)
    assert evaluate(contiguous_plan(trace, Topology(gpus_per_node=2)), trace)["local_fraction"] == 1.0


@pytest.mark.parametrize(
    ("experts", "layers", "message"),
    [
        (16, [0, 1, 2], "the plan is for 8 experts a layer, the trace has 16; "),
        (8, [0, 1], "the plan is for 3 MoE layers, the trace has 2; "),
        (8, [0, 1, 3], "the plan is for [0, 1, 2] as moe_layer_ids, the trace has [0, 1, 3]; "),
    ],
)
def test_a_trace_of_another_model_is_refused(
    random_trace: RoutingTrace, experts: int, layers: list[int], message: str
) -> None:
    plan = contiguous_plan(random_trace, Topology(gpus_per_node=4))
    ids = np.zeros((1, len(layers)), dtype=np.int64)
    other = RoutingTrace.from_arrays(ids, num_experts=experts, moe_layer_ids=layers)
    with pytest.raises(InputError) as error:
        evaluate(plan, other)
    assert str(error.value) == message + "use a plan that was placed on a trace of this model"


def test_a_trace_without_tokens_is_refused(random_trace: RoutingTrace) -> None:
    plan = contiguous_plan(random_trace, Topology(gpus_per_node=4))
    nothing = random_trace.select(np.zeros(50, dtype=bool))
    with pytest.raises(
        InputError, match="the trace has no tokens to evaluate the plan on; choose one that has"
    ):
        evaluate(plan, nothing)


@pytest.mark.data
def test_gpt_oss_on_four_gpus_sends_about_four_and_a_half_messages() -> None:
    path = TRACES / "gptoss20b_mmlu_validation.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent; it is not part of the repository")
    recorded = np.load(path, allow_pickle=False)
    trace = RoutingTrace.from_arrays(
        recorded["experts"],
        num_experts=int(recorded["num_experts"]),
        sequence=recorded["seq"],
        position=recorded["pos"],
    )
    figures = evaluate(contiguous_plan(trace, Topology(gpus_per_node=4)), trace)
    messages = figures["strategies"]["dispatch_combine"]["messages_per_token_layer"]
    assert messages == pytest.approx(4.5, rel=0.03)
