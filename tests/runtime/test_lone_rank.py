"""A job of one rank, and how errors of a rank are told from a lost rank."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from exflow.errors import InputError, WrongResult
from exflow.job import liveness
from exflow.job.cluster import annotate_errors, join_cluster
from exflow.job.environment import Place
from exflow.job.launch import LostContact
from exflow.model.checkpoint import Checkpoint
from exflow.model.random_weights import RandomWeights
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import Deployment, default_plan, deploy, load_model
from tests.runtime.distributed_cases import FAMILIES, MIXED, Bench, profiled, random_plan

pytestmark = pytest.mark.distributed


@pytest.fixture
def lone_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as torchrun would start it for a job of one rank."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in (place | {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}).items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():  # a rank that has lost another one does not take leave
        dist.destroy_process_group()


@pytest.mark.parametrize("model", ["top1", "top2", *FAMILIES])
@pytest.mark.parametrize("strategy", ["dispatch-combine", "coherent", "replicated"])
def test_a_job_of_one_rank(bench: Bench, lone_rank: None, model: str, strategy: Strategy) -> None:
    plan = default_plan(bench.config_of(model), Topology(gpus_per_node=1))
    with join_cluster("cpu") as cluster:
        generation = deploy(
            Deployment(Checkpoint.open(bench.model(model)), Strategy(strategy), plan), cluster
        ).generate(MIXED)
    assert generation.tokens == bench.run(model, [MIXED]).generation.tokens
    assert generation.decode.messages == generation.decode.kv_bytes == generation.decode.wire_bytes == 0


def test_a_shape_alone_is_deployed(bench: Bench, lone_rank: None) -> None:
    weights = RandomWeights(bench.config(top_k=2, head_dim=24, activation="swiglu"), seed=1)
    plan = random_plan(profiled(bench.decoder(weights.config)), Topology(gpus_per_node=1), 12)
    with join_cluster("cpu") as cluster:
        generation = deploy(Deployment(weights, Strategy.COHERENT, plan), cluster).generate(MIXED)
    assert generation.tokens == load_model(weights).generate(MIXED).tokens


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]:26037", "lost the connection to one"),
        ("writev: Broken pipe", "lost the connection to one"),
        ("[unbound_buffer.cc:78] Timed out waiting 9000ms for recv", "no sign of life from one"),
    ],
)
def test_a_lost_rank_is_told_from_other_errors(
    lone_rank: None, monkeypatch: pytest.MonkeyPatch, sign: str, words: str
) -> None:
    monkeypatch.setattr(liveness, "_GRACE_S", 0.0)
    lost = pytest.raises(LostContact, match=f"{words} of 1 ranks (for 9 s )?in a gather, step 1")
    with lost as caught, join_cluster("cpu", 9), annotate_errors("step 1"), annotate_errors("a gather"):
        raise RuntimeError(sign)
    assert not caught.value.told


def test_other_errors_are_no_lost_rank(lone_rank: None) -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, join_cluster("cpu"):
        raise RuntimeError("shapes cannot be multiplied")
    assert not isinstance(caught.value, LostContact)
    assert caught.value.__notes__ == ["on rank 0 of 1"]  # the traceback is all that is said


def test_a_wrong_result_stays_one(lone_rank: None) -> None:
    with pytest.raises(WrongResult, match="sequence 1"), join_cluster("cpu"):
        raise WrongResult("sequence 1")


def test_one_rank_of_each_node_tells() -> None:
    store = dist.HashStore()
    places = [Place(rank, num_ranks=4, local_rank=rank % 2, ranks_per_node=2) for rank in range(4)]
    assert [liveness.LivenessMonitor(place, 9, store).is_told() for place in places] == [
        False,
        True,
        False,
        True,
    ]


def test_nodes_of_different_sizes_are_bad_input(lone_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with (
        pytest.raises(InputError, match="3 of 5 ranks are on this node; start the same number on every node"),
        join_cluster("cpu"),
    ):
        pass
