"""Captured decode steps of one process, in Triton's interpreter: what is kept from request to request."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from exflow.errors import InputError, WrongResult
from exflow.job.cluster import Cluster
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, Rows
from exflow.model.sampling import Sampling
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import default_plan, load_model
from exflow.runtime.engine import Engine
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.request import Request
from exflow.runtime.strategies import single_process

captured = pytest.importorskip("exflow.runtime.graph_runner", reason="needs triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")

PROMPTS = [[65, 66, 67], [72, 69], [42]]
CPU = torch.device("cpu")


def capturing(decoder: Decoder) -> Engine:
    cluster = Cluster(0, 1, 1, CPU)
    tables = PlanTables.of(default_plan(decoder.config, Topology(gpus_per_node=1)), CPU)
    capture = captured.Capture(decoder, tables, cluster, 1, False, "one-sided")
    return Engine(decoder, single_process(), capture)


@pytest.mark.parametrize(
    ("family", "many_rows"),
    [
        *(pytest.param(name, False, marks=pytest.mark.all) for name in ("mixtral", "olmoe", "qwen3_moe")),
        ("gpt_oss", False),
        ("gpt_oss", True),
    ],
)
def test_published_models_have_the_scores_of_eager_steps(
    hugging_face_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, family: str, many_rows: bool
) -> None:
    """Grouped products are used too; the past is longer than a window, and in two parts."""
    if many_rows:
        monkeypatch.setattr("exflow.runtime.step_buffers.MANY_ROWS", 0)
    decoder = load_model(hugging_face_model(family).folder).decoder
    request = Request([[65, 66, 67, 68, 69, 70, 71], [42]], 3)
    found: list[dict[tuple[int, int], Tensor]] = []
    for engine in (capturing(decoder), Engine(decoder, single_process())):
        found.append(seen := {})
        engine.generate(request, partial(keep, seen))
    captured_scores, eager_scores = found
    assert captured_scores.keys() == eager_scores.keys()
    for place, score in captured_scores.items():
        torch.testing.assert_close(score, eager_scores[place], atol=1e-4, rtol=1e-4)


def keep(seen: dict[tuple[int, int], Tensor], rows: Rows, logits_TV: Tensor) -> None:
    places = zip(rows.sequence_T.tolist(), rows.position_T.tolist(), strict=True)
    seen.update(zip(places, logits_TV.clone(), strict=True))


def test_requests_share_steps_and_their_cache(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder]
) -> None:
    decoder = tiny_decoder(tiny_config(num_hidden_layers=2))
    engine, eager = capturing(decoder), Engine(decoder, single_process())
    engine.prepare([2, 1], 8)
    two, one = engine.captured[1], engine.captured[0]
    assert (two.shape.sequences, one.shape.sequences) == (2, 1)
    assert one.memory is two.memory

    for prompts in (PROMPTS[:1], PROMPTS[1:], PROMPTS[2:], PROMPTS[:2]):
        assert engine.generate(Request(prompts, 2)).tokens == eager.generate(Request(prompts, 2)).tokens
    assert engine.captured == [two, one]

    more = engine.generate(Request(PROMPTS, 2))  # has no room in the cache of two
    assert more.tokens == eager.generate(Request(PROMPTS, 2)).tokens
    assert [each.shape.sequences for each in engine.captured] == [4]
    engine.close()
    assert engine.captured == []
    with pytest.raises(InputError, match="positions 65: the model has 64"):
        engine.prepare([1], 65)


def test_a_seed_does_not_ask_for_another_step(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder]
) -> None:
    decoder = tiny_decoder(tiny_config(num_hidden_layers=2))
    engine, eager = capturing(decoder), Engine(decoder, single_process())
    requests = [Request(PROMPTS[:1], 4, Sampling(temperature=2.0, seed=seed)) for seed in (1, 2)]
    found = [engine.generate(request).tokens for request in requests]
    assert found == [eager.generate(request).tokens for request in requests]
    assert found[0] != found[1]
    assert len(engine.captured) == 1
    engine.generate(Request(PROMPTS[:1], 2))
    assert len(engine.captured) == 2


def test_the_steps_used_longest_ago_are_given_up(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exflow.runtime.engine.MOST_CAPTURED", 2)
    engine = capturing(tiny_decoder(tiny_config(num_hidden_layers=1)))
    for ends in ((), (1,), (), (2,)):
        engine.generate(Request(PROMPTS[:1], 2, end_tokens=ends))
    assert [each.step.end_tokens for each in engine.captured] == [(2,), ()]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9)], ids=["greedy", "sampled"]
)
def test_logits_that_are_not_finite_are_named(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder], sampling: Sampling
) -> None:
    decoder = tiny_decoder(tiny_config(num_hidden_layers=2))
    engine = capturing(decoder)
    request = Request([PROMPTS[2], PROMPTS[1]], 4, sampling)
    step = engine.capture_for(request).step
    assert decoder.positions is not None
    with torch.inference_mode():
        decoder.positions.weight[3] = torch.nan  # where sequence 1 is in its second step, and 0 in its third
    with pytest.raises(WrongResult, match=r"^sequence 1, step 2 \(0 is .* NaN or infinite"):
        engine.generate(request)
    assert step is engine.captured[0].step
