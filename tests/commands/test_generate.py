"""`exflow generate`: what its defaults come to, and relays."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exflow.commands.generate import GenerateJob, resolved
from exflow.errors import InputError
from exflow.job.cluster import Cluster
from exflow.model.config import ModelConfig
from exflow.model.sampling import GREEDY
from exflow.placement.plan.topology import Topology
from exflow.runtime.request import Request

NODES = Topology(num_nodes=2, gpus_per_node=2)


@pytest.fixture
def job(tiny_checkpoint: Callable[..., Path], tiny_config: Callable[..., ModelConfig]) -> GenerateJob:
    """A job on CPUs with the defaults of the command line, of a model with two experts a token."""
    return GenerateJob(
        model=tiny_checkpoint(tiny_config(top_k=2)),
        prompts=["Rain"],
        max_new_tokens=4,
        sampling=GREEDY,
        plan=None,
        strategy="auto",
        device="cpu",
        dtype="auto",
        trace=None,
        ignore_end=True,
        replay=None,
    )


def test_the_defaults_on_cpus(job: GenerateJob) -> None:
    deployment = job.deployment(NODES)
    assert (deployment.strategy, deployment.dtype) == ("auto", torch.float32)
    assert not deployment.hierarchical


def test_auto_measures_nothing_on_a_single_rank(
    job: GenerateJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exflow.cost.auto.measure", lambda *_: pytest.fail("measured"))
    alone = Cluster(0, 1, 1, torch.device("cpu"))
    chosen = resolved(job.deployment(Topology(gpus_per_node=1)), Request([[1]], 4), alone)
    assert chosen.strategy == "coherent"
    assert capsys.readouterr().err == ""


def test_relays_on_cpus_are_for_prompts_and_eager_steps(job: GenerateJob) -> None:
    deployment = replace(job, transport="relayed").deployment(NODES)
    assert (deployment.transport, deployment.hierarchical) == ("eager", True)
    with pytest.raises(InputError, match=r"transport relayed: .* have no nodes of several ranks"):
        replace(job, transport="relayed").check(4)
    with pytest.raises(InputError, match="transport relayed: strategy replicated has nothing to relay"):
        replace(job, transport="relayed", strategy="replicated").deployment(NODES)


def test_auto_with_relays_leaves_them_out_where_it_takes_replicated(
    job: GenerateJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exflow.cost.auto.choose_strategy", lambda *_: ("replicated", "auto: replicated"))
    deployment = replace(job, transport="relayed").deployment(NODES)
    chosen = resolved(deployment, Request([[1]], 4), Cluster(1, 4, 2, torch.device("cpu")))
    assert (chosen.strategy, chosen.transport, chosen.hierarchical) == ("replicated", "eager", False)
