"""The strategy `auto`: figures for the model, the measuring, and a job that resolves it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from exflow.cost.auto import expected_counts, expected_figures, predictions, step_traffic
from exflow.cost.probe import link_of
from exflow.cost.workload import StepTraffic, Workload
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.placement.fastest_plan import place_for_time
from exflow.placement.make_plan import place
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machine import Link, Machine
from exflow.placement.time.serving import Serving
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import default_plan
from tests.one_process import tokens_of_one_process

TOPOLOGY = Topology(num_nodes=2, gpus_per_node=2)
SLOW = Machine(Link(1e-3, 1e9), Link(1e-2, 1e7), 1e9, 1e9)


@pytest.fixture
def trace(tiny_decoder: Callable[..., Decoder], tiny_config: Callable[..., ModelConfig]) -> RoutingTrace:
    import torch

    from exflow.commands.profile import profile

    windows = torch.randint(257, (16, 32), generator=torch.Generator().manual_seed(5))
    return profile(tiny_decoder(tiny_config(top_k=2)), windows, path=None)


def test_a_line_through_two_times() -> None:
    """5 s for 10 bytes, 14 s for 100: 4 s and a tenth of a second a byte."""
    link = link_of(5, 14, 10, 100)
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((4, 10))
    assert link_of(5, 4, 10, 100).latency_s == pytest.approx(5)  # noise: no time for bytes


@pytest.mark.parametrize(("size", "name"), [(1, "dispatch_combine"), (2, "node_coherent"), (4, "coherent")])
def test_what_any_group_moves_is_what_evaluate_says(trace: RoutingTrace, size: int, name: str) -> None:
    plan = place(trace, TOPOLOGY)
    counted, stored = (
        step_traffic(plan, trace, size),
        StepTraffic.of(evaluate(plan, trace)["strategies"][name], size),
    )
    for one, other in ((counted.dispatch, stored.dispatch), (counted.combine, stored.combine)):
        assert one == pytest.approx(other)
    assert counted.kv == pytest.approx(stored.kv)
    assert counted.exchanges == stored.exchanges
    assert counted.expert_imbalance == pytest.approx(stored.expert_imbalance)
    assert counted.attention_imbalance >= 1


def test_a_plan_without_figures_is_judged_by_random_routing(tiny_config: Callable[..., ModelConfig]) -> None:
    """Three of four random choices are on another rank, for 8 experts on 4 ranks."""
    plan = default_plan(tiny_config(), TOPOLOGY)
    assert expected_figures(plan, top_k=1)["dispatch_combine"]["dispatch"] == pytest.approx(0.75, abs=0.03)


def test_every_strategy_is_weighed(trace: RoutingTrace, tiny_config: Callable[..., ModelConfig]) -> None:
    plan = place(trace, TOPOLOGY)
    workload = Workload.of(tiny_config(top_k=2), plan, batch=8, context=16, itemsize=4)
    assert workload.expert_bytes == 2 * 32 * 16 * 4
    assert workload.kv_bytes == 2 * 2 * 8 * 4
    found = predictions(workload, plan, SLOW)
    assert [each.strategy for each in found] == [
        "dispatch-combine",
        "coherent",
        "node-coherent",
        "replicated",
    ]
    assert all(each.exchange_s > 0 for each in found)
    one_node = place(trace, Topology(gpus_per_node=4))
    names = [each.strategy for each in predictions(workload, one_node, SLOW)]
    assert names == ["dispatch-combine", "coherent", "replicated"]


def test_figures_of_time_count_for_their_own_batch(trace: RoutingTrace) -> None:
    """The load of experts is the plan's under every strategy; the rows are those of its own one."""
    serving = Serving(strategy=Strategy.DISPATCH_COMBINE, batch=2)
    plan = place_for_time(trace, TOPOLOGY, serving, method="contiguous")
    own = expected_counts(plan, 2)
    time = plan.expected["time"]
    assert own[Strategy.DISPATCH_COMBINE].link_rows == time["busiest_link_rows"]
    assert own[Strategy.COHERENT].link_rows is None
    assert {each.experts_read for each in own.values()} == {time["experts_touched"]}
    assert {each.expert_imbalance for each in own.values()} == {time["compute_imbalance"]}
    assert expected_counts(plan, 3) == {}
    old = {name: figure for name, figure in time.items() if name != "experts_touched"}
    assert expected_counts(replace(plan, expected=plan.expected | {"time": old}), 2) == {}
    assert expected_counts(place(trace, TOPOLOGY), 2) == {}


@pytest.mark.distributed
def test_ranks_resolve_it_alike(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The default is `auto`: rank 0 says its choice in one line, and the tokens are those of one process."""
    model = tiny_checkpoint()
    command = [sys.executable, "-m", "exflow.cli", "generate", str(model), "--nproc", "2", "--json"]
    command += ["--prompt", "Rain", "--prompt", "Wind", "--max-new-tokens", "4", "--ignore-end"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (why,) = [line[8:] for line in done.stderr.splitlines() if line.startswith("exflow: auto: ")]
    assert result["strategy"] in ("dispatch-combine", "coherent", "replicated")
    assert why.startswith(f"auto: {result['strategy']}, ") and " ms predicted against " in why
    assert result["tokens"] == tokens_of_one_process(model, ["Rain", "Wind"], 4)
