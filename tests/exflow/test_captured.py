"""Captured decode steps of one process, in Triton's interpreter: what is kept from request to request."""

from collections.abc import Callable

import pytest
import torch

from exflow.decoder import Decoder
from exflow.deploy import contiguous_plan
from exflow.distributed import Cluster
from exflow.engine import Engine, Request
from exflow.errors import WrongResult
from exflow.moe import PlanTables
from exflow.placement.topology import Topology
from exflow.sampling import Sampling
from exflow.strategies import single_process

captured = pytest.importorskip("exflow.captured", reason="needs triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")

PROMPTS = [[65, 66, 67], [72, 69], [42]]
CPU = torch.device("cpu")


def capturing(decoder: Decoder) -> Engine:
    cluster = Cluster(0, 1, 1, CPU)
    tables = PlanTables.of(contiguous_plan(decoder.config, Topology(gpus_per_node=1)), CPU)
    capture = captured.Capture(decoder, tables, cluster, 1, False, "one-sided")
    return Engine(decoder, single_process(), capture)


def test_requests_share_steps_and_their_cache(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder()
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


def test_a_seed_does_not_ask_for_another_step(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder()
    engine, eager = capturing(decoder), Engine(decoder, single_process())
    requests = [Request(PROMPTS[:1], 4, Sampling(temperature=2.0, seed=seed)) for seed in (1, 2)]
    found = [engine.generate(request).tokens for request in requests]
    assert found == [eager.generate(request).tokens for request in requests]
    assert found[0] != found[1]
    assert len(engine.captured) == 1
    engine.generate(Request(PROMPTS[:1], 2))
    assert len(engine.captured) == 2


def test_the_steps_used_longest_ago_are_given_up(
    tiny_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exflow.engine.MOST_CAPTURED", 2)
    engine = capturing(tiny_decoder())
    for ends in ((), (1,), (), (2,)):
        engine.generate(Request(PROMPTS[:1], 2, end_tokens=ends))
    assert [each.step.end_tokens for each in engine.captured] == [(2,), ()]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9)], ids=["greedy", "sampled"]
)
def test_logits_that_are_not_finite_are_named(
    tiny_decoder: Callable[..., Decoder], sampling: Sampling
) -> None:
    decoder = tiny_decoder()
    engine = capturing(decoder)
    request = Request([PROMPTS[2], PROMPTS[1]], 4, sampling)
    step = engine.capture_for(request).step
    assert decoder.positions is not None
    with torch.inference_mode():
        decoder.positions.weight[3] = torch.nan  # where sequence 1 is in its second step, and 0 in its third
    with pytest.raises(WrongResult, match=r"^sequence 1, step 2 \(0 is .* NaN or infinite"):
        engine.generate(request)
    assert step is engine.captured[0].step
