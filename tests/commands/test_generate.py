"""`exflow generate`: what its options come to, and relays."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exflow.commands.generate_job import GenerateOptions
from exflow.errors import InputError
from exflow.job.cluster import Cluster
from exflow.model.config import ModelConfig
from exflow.model.sampling import GREEDY
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology

NODES = Topology(num_nodes=2, gpus_per_node=2)


@pytest.fixture
def options(tiny_checkpoint: Callable[..., Path], tiny_config: Callable[..., ModelConfig]) -> GenerateOptions:
    """The defaults of the command line on CPUs, for a model with two experts a token."""
    return GenerateOptions(
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


def test_the_defaults_on_cpus(options: GenerateOptions) -> None:
    job = options.resolve(NODES)
    assert (job.strategy, job.dtype, job.relays) == (None, torch.float32, False)
    assert job.plan.topology == NODES


def test_auto_measures_nothing_on_a_single_rank(
    options: GenerateOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exflow.cost.auto.measure", lambda *_: pytest.fail("measured"))
    job = options.resolve(Topology(gpus_per_node=1))
    assert job.deployment(Cluster(0, 1, 1, torch.device("cpu"))).strategy == "coherent"
    assert capsys.readouterr().err == ""


def test_relays_on_cpus_are_for_prompts_and_eager_steps(options: GenerateOptions) -> None:
    job = replace(options, transport="relayed").resolve(NODES)
    assert (job.transport, job.relays) == ("eager", True)
    with pytest.raises(InputError, match=r"transport relayed: .* have no nodes of several ranks"):
        replace(options, transport="relayed").resolve(Topology(gpus_per_node=4))
    with pytest.raises(InputError, match="transport relayed: strategy replicated has nothing to relay"):
        replace(options, transport="relayed", strategy="replicated").resolve(NODES)


def test_auto_with_relays_leaves_them_out_where_it_takes_replicated(
    options: GenerateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "exflow.cost.auto.choose_strategy", lambda *_: (Strategy.REPLICATED, "auto: replicated")
    )
    job = replace(options, transport="relayed").resolve(NODES)
    chosen = job.deployment(Cluster(1, 4, 2, torch.device("cpu")))
    assert (chosen.strategy, chosen.transport, chosen.hierarchical) == ("replicated", "eager", False)
