"""Which models are given captured decode steps, and what is said of the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from exflow.config import ModelConfig
from exflow.distributed import Cluster
from exflow.errors import InputError
from exflow.transport import choose_transport, transport_named, untried_in_captured_steps

GPUS = Cluster(0, 2, 2, torch.device("cuda"))  # which need not be there


@pytest.fixture
def rotary(tiny_config: Callable[..., ModelConfig]) -> ModelConfig:
    return tiny_config(norm="rmsnorm", rope={"theta": 1e4})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 2},
        {"activation": "swiglu", "head_dim": 24},
        {"tied_head": False, "norm_eps": 1e-6},
        {"dense_layers": [1], "dense_intermediate_size": 24},
        {"gate_softmax": "all"},
        {"top_k": 2, "gate_softmax": "chosen"},
    ],
)
def test_models_that_captured_steps_have_run_with(
    tiny_config: Callable[..., ModelConfig], changes: dict[str, Any]
) -> None:
    assert untried_in_captured_steps(tiny_config(**changes)) == ""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "rmsnorm"}, "norm"),
        ({"rope": {"theta": 1e4}}, "rope"),
        ({"qk_norm": "head"}, "qk_norm"),
        ({"qkv_clip": 2.0}, "qkv_clip"),
        ({"windows": [None, 3, None, 3]}, "windows"),
        ({"attention_bias": True, "attention_sinks": True}, "attention_bias, attention_sinks"),
        ({"gate_bias": True, "expert_bias": True}, "gate_bias, expert_bias"),
        ({"top_k": 2, "gate_softmax": "all"}, "gate_softmax"),
        ({"gate_softmax": "chosen"}, "gate_softmax"),
        ({"activation": "clamped-swiglu"}, "activation"),
    ],
)
def test_settings_that_they_have_not_run_with(
    tiny_config: Callable[..., ModelConfig], changes: dict[str, Any], named: str
) -> None:
    untried = untried_in_captured_steps(tiny_config(**changes))
    assert untried.startswith(f"captured ones have not run on a GPU with the model's {named}; ")


def test_auto_falls_back_to_eager_and_says_why(
    rotary: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_transport("auto", GPUS, rotary) == "eager"
    said = "exflow: decode steps are eager: captured ones have not run on a GPU with the model's norm, rope; "
    assert capsys.readouterr().err.startswith(said)
    assert transport_named("auto", "cuda", rotary) == "auto"
    assert choose_transport("eager", GPUS, rotary) == transport_named("eager", "cuda", rotary) == "eager"


def test_what_was_asked_for_by_name_is_done(rotary: ModelConfig) -> None:
    assert transport_named("collective", "cuda", rotary) == "collective"
    assert choose_transport("collective", GPUS, rotary) == "collective"


@pytest.mark.parametrize(
    ("per_node", "options", "fault", "chosen", "said"),
    [
        (2, {}, "", "relayed", ""),
        (2, {}, "no NVLink", "collective", "decode steps are not relayed: no NVLink"),
        (1, {}, "", "collective", "decode steps are not relayed: there is one rank on each node"),
        (2, {"replicated": True}, "", "collective", ""),
        (2, {"hierarchical": True}, "no NVLink", "eager", "decode steps are not relayed: no NVLink"),
        (4, {}, "", "one-sided", ""),
    ],
)
def test_what_auto_takes_on_nodes(
    tiny_config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    per_node: int,
    options: dict[str, bool],
    fault: str,
    chosen: str,
    said: str,
) -> None:
    monkeypatch.setattr("exflow.transport._fault_of_symmetric_memory", lambda cluster: fault)
    nodes = Cluster(0, 4, per_node, torch.device("cuda"))
    assert choose_transport("auto", nodes, tiny_config(), **options) == chosen
    assert capsys.readouterr().err == (f"exflow: {said}\n" if said else "")


@pytest.mark.parametrize(
    ("name", "per_node", "replicated", "message"),
    [
        ("one-sided", 2, False, "--transport one-sided: the ranks are on 2 nodes"),
        ("relayed", 4, False, "--transport relayed: the ranks are on one node"),
        ("relayed", 1, False, "--transport relayed: there is one rank on each node"),
        ("relayed", 2, True, "--transport relayed: does not go with --strategy replicated"),
    ],
)
def test_transports_that_do_not_work_on_such_nodes(
    tiny_config: Callable[..., ModelConfig], name: str, per_node: int, replicated: bool, message: str
) -> None:
    nodes = Cluster(0, 4, per_node, torch.device("cuda"))
    with pytest.raises(InputError, match=message):
        choose_transport(name, nodes, tiny_config(), replicated)
