"""Jobs on the GPUs of this machine against one process: every strategy and transport, the same tokens.

One job runs all its cases (cases_job.py); the tests look at what it wrote.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exflow.commands.profile import profile
from exflow.job.launch import LOST_CONTACT
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import load_model
from exflow.runtime.request import Request

GPUS = torch.cuda.device_count()
RANKS = 4 if GPUS >= 4 else 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA GPUs, torch sees {GPUS}"),
]

STRATEGIES = ("dispatch-combine", "coherent", "replicated")
TRANSPORTS = ("eager", "collective", "one-sided")
PLANS = {"plain": 8, "replicas": 12}  # slots in each layer
MODELS: dict[str, dict[str, Any]] = {
    "top1": {},
    "top2": {  # all that a published model may want
        "top_k": 2,
        "activation": "clamped-swiglu",
        "norm": "rmsnorm",
        "rope": {"theta": 100.0},
        "qk_norm": "head",
        "windows": [None, 5, None, 5],
        "attention_bias": True,
        "attention_sinks": True,
        "gate_bias": True,
        "expert_bias": True,
    },
}
REQUESTS = [
    [[65, 66, 67], [72, 69, 76, 76], [42], [1, 2, 3, 4, 5, 6], [200] * 7, [9] * 3],
    [[17, 250], [3]],  # another bucket; on four GPUs other homes
    [[90, 91, 92], [4, 4, 4], [60], [61, 62], [8, 7]],  # the first one's bucket
]
NEW = 24
CASES = [
    f"{strategy} {transport} {plan}" for strategy, transport, plan in product(STRATEGIES, TRANSPORTS, PLANS)
]
RELAYED = ("dispatch-combine", "node-coherent", "coherent")
ON_NODES = [
    f"{strategy} {transport} {plan}"
    for strategy, transport, plan in product(RELAYED, ("eager", "relayed"), PLANS)
]


def prepare(
    folder: Path,
    model: Path,
    plans: dict[str, Plan],
    names: list[str],
    nodes: int = 1,
    dies_at: int = 0,
) -> None:
    """Write what cases_job.py reads. On several nodes all goes by relays."""
    for name, plan in plans.items():
        plan.save(folder / f"{name}.json")
    cases = [
        {
            "name": name,
            "strategy": strategy,
            "transport": transport,
            "plan": str(folder / f"{plan}.json"),
            "hierarchical": nodes > 1,
        }
        for name in names
        for strategy, transport, plan in [name.split()]
    ]
    job = {"model": str(model), "cases": cases, "requests": REQUESTS, "new": NEW, "dies_at": dies_at}
    job |= {"device": "cuda", "nodes": nodes}
    (folder / "job.json").write_text(json.dumps(job))


def plan_of(decoder: Decoder, slots: int, topology: Topology) -> Plan:
    """Every expert once in each layer and any of them in the slots that are left, all of them anywhere."""
    windows_NS = torch.randint(257, (8, 64), generator=torch.Generator().manual_seed(5))
    trace = profile(decoder, windows_NS, path=None)
    rng = np.random.default_rng(2)
    rows = [
        rng.permutation([*range(8), *rng.integers(0, 8, slots - 8)]) for _ in decoder.config.moe_layer_ids
    ]
    return Plan.of_slots(np.stack(rows), topology, trace, method="random")


Found = tuple[dict[str, Any], list[Any]]  # what a job found, by case, and the tokens of one process


@pytest.fixture(scope="module")
def make_job(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
) -> Callable[[str, Topology, list[str]], tuple[Path, Path]]:
    """Prepares a job of these cases with one of the models: its folder, and the model's."""

    def make(name: str, topology: Topology, names: list[str]) -> tuple[Path, Path]:
        config = tiny_config(**MODELS[name])
        folder, model = tmp_path_factory.mktemp("job"), tiny_checkpoint(config)
        plans = {name: plan_of(tiny_decoder(config), slots, topology) for name, slots in PLANS.items()}
        prepare(folder, model, plans, names, topology.num_nodes)
        return folder, model

    return make


@pytest.fixture(scope="module", params=MODELS)
def outcome(request: pytest.FixtureRequest, make_job: Callable[..., tuple[Path, Path]]) -> Found:
    """Job of ranks on one node."""
    folder, model = make_job(request.param, Topology(gpus_per_node=RANKS), CASES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    worker = str(Path(__file__).with_name("cases_job.py"))
    done = subprocess.run([*torchrun, worker, str(folder)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return found_in(folder, model)


def found_in(folder: Path, model: Path) -> Found:
    return json.loads((folder / "found.json").read_text()), tokens_of_one_process(model)


def tokens_of_one_process(model: Path) -> list[Any]:
    alone = load_model(model, "cuda", transport="eager")
    return [alone.generate(Request(prompts, NEW)).tokens for prompts in REQUESTS]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_one_process(outcome: Found, case: str) -> None:
    found, tokens = outcome
    assert found[case]["tokens"] == tokens


@pytest.mark.parametrize("case", [case for case in CASES if "eager" not in case])
def test_a_step_is_captured_once_a_bucket(outcome: Found, case: str) -> None:
    found, _ = outcome
    assert found[case]["batches"] == [8, 4 if RANKS == 4 else 2]


@pytest.mark.parametrize(("strategy", "plan"), list(product(STRATEGIES[:2], PLANS)))
def test_captured_steps_count_the_traffic_of_eager_ones(outcome: Found, strategy: str, plan: str) -> None:
    found, _ = outcome
    eager, *captured = (found[f"{strategy} {transport} {plan}"]["decode"] for transport in TRANSPORTS)
    counted = [key for key in eager if key.startswith(("dispatch", "return", "kv_", "hidden"))]
    assert any(eager[key] for key in counted)
    for each in captured:
        assert {key: each[key] for key in counted} == {key: eager[key] for key in counted}


def start_nodes(folder: Path) -> list[subprocess.Popen[str]]:
    """Two agents that stand for nodes: each sees two GPUs, and starts a rank on each."""
    every = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS)))).split(",")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "static", "--master-addr", "localhost", "--master-port", "29619"]
    worker = [str(Path(__file__).with_name("cases_job.py")), str(folder)]
    return [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(node), *worker],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(every[2 * node : 2 * node + 2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]


@pytest.fixture(scope="module", params=MODELS)
def on_nodes(request: pytest.FixtureRequest, make_job: Callable[..., tuple[Path, Path]]) -> Found:
    """Job on two nodes of two GPUs."""
    if GPUS < 4:
        pytest.skip(f"needs four CUDA GPUs, torch sees {GPUS}")
    folder, model = make_job(request.param, Topology(num_nodes=2, gpus_per_node=2), ON_NODES)
    nodes = start_nodes(folder)
    try:
        words = [node.communicate(timeout=400)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], words
    return found_in(folder, model)


@pytest.mark.parametrize("case", ON_NODES)
def test_nodes_find_the_tokens_of_one_process(on_nodes: Found, case: str) -> None:
    found, tokens = on_nodes
    assert found[case]["tokens"] == tokens


@pytest.mark.parametrize(("strategy", "plan"), list(product(RELAYED, PLANS)))
def test_captured_relays_count_the_messages_of_eager_ones(on_nodes: Found, strategy: str, plan: str) -> None:
    found, _ = on_nodes
    eager, relayed = (found[f"{strategy} {transport} {plan}"]["decode"] for transport in ("eager", "relayed"))
    counted = [key for key in eager if key.startswith(("dispatch", "return", "kv_", "hidden"))]
    assert eager["dispatch_inter"] and eager["dispatch_intra"]
    assert {key: relayed[key] for key in counted} == {key: eager[key] for key in counted}


def test_a_rank_that_dies_does_not_leave_the_others_spinning(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_decoder: Callable[..., Decoder]
) -> None:
    plans = {"plain": plan_of(tiny_decoder(), 8, Topology(gpus_per_node=RANKS))}
    prepare(tmp_path, tiny_checkpoint(), plans, ["coherent one-sided plain"], dies_at=5)
    # without torchrun, whose agent would end the others before they find out
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617", "TORCHELASTIC_RUN_ID": "test"}
    place |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    worker = [sys.executable, str(Path(__file__).with_name("cases_job.py")), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            worker,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        words = [rank.communicate(timeout=150)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[-1].returncode == -9
    assert [rank.returncode for rank in ranks[:-1]] == [LOST_CONTACT] * (RANKS - 1), words
    assert all("no word from another rank" in word for word in words[:-1])
