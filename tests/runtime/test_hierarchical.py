"""Tokens that travel by relays: two nodes of two ranks against one process, and the traffic predicted."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exflow.commands.profile import profile
from exflow.errors import InputError
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import count_traffic
from exflow.profiling.trace import DECODE, RoutingTrace
from exflow.runtime.deploy import load_model
from exflow.runtime.request import Request
from exflow.runtime.strategies import check_relays, strategy_named
from exflow.runtime.trace_recorder import JobRecorder

pytestmark = pytest.mark.distributed

TOPOLOGY = Topology(num_nodes=2, gpus_per_node=2)
GROUPS = {"dispatch-combine": 1, "node-coherent": 2, "coherent": 4}
PLANS = {"plain": 8, "replicas": 12}  # slots in each layer
CASES = [f"{strategy} {plan}" for strategy, plan in product(GROUPS, PLANS)]
REQUESTS = [
    [[65, 66, 67], [72, 69, 76, 76], [42], [1, 2, 3, 4, 5, 6], [200] * 7],
    [[17, 250], [3], [90, 91, 92], [4, 4, 4], [60], [61, 62]],
]
NEW = 12


@dataclass
class Outcome:
    """Findings of the job by case; tokens and routing of the last request in one process."""

    found: dict[str, Any]
    tokens: list[Any]
    decoded: RoutingTrace
    plans: dict[str, Plan]


def plan_of(decoder: Decoder, slots: int) -> Plan:
    windows_NS = torch.randint(257, (8, 64), generator=torch.Generator().manual_seed(5))
    trace = profile(decoder, windows_NS, path=None)
    rng = np.random.default_rng(2)
    rows = [rng.permutation([*range(8), *rng.integers(0, 8, slots - 8)]) for _ in range(trace.num_layers)]
    return Plan.of_slots(np.stack(rows), TOPOLOGY, trace, method="random")


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    run_jobs: Callable[..., None],
) -> Outcome:
    config = tiny_config(top_k=3, moe_every=2)
    folder, model = tmp_path_factory.mktemp("job"), tiny_checkpoint(config)
    plans = {name: plan_of(tiny_decoder(config), slots) for name, slots in PLANS.items()}
    for name, plan in plans.items():
        plan.save(folder / f"{name}.json")
    cases = [
        {"name": name, "strategy": strategy, "plan": str(folder / f"{plan}.json")}
        | {"transport": "eager", "hierarchical": True}
        for name in CASES
        for strategy, plan in [name.split()]
    ]
    job = {"model": str(model), "cases": cases, "requests": REQUESTS, "new": NEW, "dies_at": 0}
    (folder / "job.json").write_text(json.dumps(job | {"device": "cpu", "nodes": 2}))
    run_jobs("cases_job", {folder: 4})
    alone = load_model(model)
    tokens = [alone.generate(Request(prompts, NEW)).tokens for prompts in REQUESTS[:-1]]
    recorder = JobRecorder(alone)
    tokens.append(alone.generate(Request(REQUESTS[-1], NEW)).tokens)
    trace = recorder.trace()
    found = json.loads((folder / "found.json").read_text())
    return Outcome(found, tokens, trace.select(trace.phase == DECODE), plans)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_one_process(outcome: Outcome, case: str) -> None:
    assert outcome.found[case]["tokens"] == outcome.tokens


@pytest.mark.parametrize("case", CASES)
def test_the_traffic_is_the_one_foretold(outcome: Outcome, case: str) -> None:
    strategy, plan = case.split()
    counted = outcome.found[case]["decode"]
    predicted = vars(count_traffic(outcome.decoded, outcome.plans[plan], GROUPS[strategy], hierarchical=True))
    sent = [name for name in predicted if name.startswith(("dispatch", "return", "kv"))]
    assert {name: counted[name] for name in sent} == {name: predicted[name] for name in sent}
    assert predicted["dispatch_inter"] and predicted["return_inter"]
    layers, steps = outcome.decoded.num_layers, NEW - 1
    assert counted["all_to_alls"] == 4 * layers * steps


def test_fewer_messages_cross_between_nodes(outcome: Outcome) -> None:
    """Three experts of a token are often on both ranks of the other node."""
    plan = outcome.plans["plain"]
    direct, relayed = (
        count_traffic(outcome.decoded, plan, 1, hierarchical=hierarchical) for hierarchical in (False, True)
    )
    assert relayed.inter_node < 0.8 * direct.inter_node
    one_rank_a_node = replace(plan, topology=Topology(num_nodes=4, gpus_per_node=1))
    same = [
        count_traffic(outcome.decoded, one_rank_a_node, 1, hierarchical=hierarchical)
        for hierarchical in (False, True)
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("topology", "top_k", "strategy", "device", "message"),
    [
        (Topology(gpus_per_node=4), 2, "auto", "cuda", r"4 ranks \(1 node of 4\) have no nodes of several"),
        (Topology(num_nodes=4, gpus_per_node=1), 2, "coherent", "cpu", "have no nodes of several ranks"),
        (TOPOLOGY, 1, "coherent", "cpu", "one expert sends one message anyway"),
        (TOPOLOGY, 2, "replicated", "cuda", "strategy replicated has nothing to relay"),
    ],
)
def test_where_there_is_nothing_to_relay(
    topology: Topology, top_k: int, strategy: Strategy, device: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_relays(topology, top_k, strategy_named(strategy, topology.num_nodes), device)


@pytest.mark.parametrize(
    ("top_k", "strategy", "device"), [(2, "coherent", "cpu"), (2, "auto", "cuda"), (1, "coherent", "cuda")]
)
def test_where_there_is(top_k: int, strategy: Strategy, device: str) -> None:
    check_relays(TOPOLOGY, top_k, strategy_named(strategy, 2), device)
