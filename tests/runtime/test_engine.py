"""Generation in one process against the plain forward pass, and the laws of requests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from exflow.errors import InputError, WrongResult
from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.config import ModelConfig
from exflow.model.decoder import Block, Decoder, Rows
from exflow.model.sampling import Sampling
from exflow.model.single_process import AllExpertsHere
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.record import record
from exflow.profiling.trace import DECODE, PREFILL
from exflow.runtime.deploy import load_model
from exflow.runtime.engine import Engine
from exflow.runtime.request import Request
from exflow.runtime.strategies import single_process
from exflow.runtime.trace_recorder import Decisions, JobRecorder, merge_decisions

PROMPTS = [[65, 66, 67], [72, 69, 76, 76, 79, 32, 87, 79, 82, 76, 68], [42], [200] * 7]
SAMPLED = Sampling(temperature=0.8, top_p=0.9, seed=1)


@pytest.fixture(params=[(1, 1), (2, 2)], ids=["top1", "top2-dense"])
def decoder(
    request: pytest.FixtureRequest,
    tiny_decoder: Callable[..., Decoder],
    tiny_config: Callable[..., ModelConfig],
) -> Decoder:
    return tiny_decoder(tiny_config(*request.param))


def engine_of(decoder: Decoder) -> Engine:
    return Engine(decoder, single_process())


def test_every_step_sees_what_a_whole_pass_sees(decoder: Decoder) -> None:
    """The logits of each choice are those of one forward pass over the prompt and all new tokens."""
    seen: dict[tuple[int, int], Tensor] = {}

    def observe(rows: Rows, logits_TV: Tensor) -> None:
        places = zip(rows.sequence_T.tolist(), rows.position_T.tolist(), strict=True)
        seen.update(zip(places, logits_TV, strict=True))

    generation = engine_of(decoder).generate(Request(PROMPTS, 9), observe)
    for sequence, (prompt, tokens) in enumerate(zip(PROMPTS, generation.tokens, strict=True)):
        whole = torch.tensor(prompt + tokens[:-1])
        rows = rows_of_batch(1, len(whole), torch.device("cpu"))
        logits_SV = decoder.logits(decoder(whole, rows, CausalAttention(1), AllExpertsHere())[0])
        for position in range(len(prompt) - 1, len(whole)):
            torch.testing.assert_close(seen[sequence, position], logits_SV[position], atol=1e-4, rtol=0)
        assert tokens == logits_SV[len(prompt) - 1 :].argmax(dim=1).tolist()
    assert len(seen) == 9 * len(PROMPTS)
    assert (generation.steps, generation.decoded_tokens) == (8, 8 * len(PROMPTS))
    assert generation.decode.messages == generation.decode.all_to_alls == 0


def test_the_first_token_comes_out_of_prefill(decoder: Decoder) -> None:
    generation = engine_of(decoder).generate(Request(PROMPTS, 1))
    assert generation.tokens == [
        tokens[:1] for tokens in engine_of(decoder).generate(Request(PROMPTS, 4)).tokens
    ]
    assert (generation.steps, generation.decoded_tokens) == (0, 0)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_sequence_does_not_depend_on_its_company(decoder: Decoder, sampling: Sampling) -> None:
    together = engine_of(decoder).generate(Request(PROMPTS, 6, sampling)).tokens
    for count in range(1, len(PROMPTS)):
        assert engine_of(decoder).generate(Request(PROMPTS[:count], 6, sampling)).tokens == together[:count]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_request_gives_the_same_tokens_again(decoder: Decoder, sampling: Sampling) -> None:
    engine = engine_of(decoder)
    request = Request(PROMPTS, 6, sampling)
    assert engine.generate(request).tokens == engine.generate(request).tokens


def test_an_end_token_ends_its_sequence_and_no_other(decoder: Decoder) -> None:
    request = Request(PROMPTS, 8, SAMPLED)
    whole = engine_of(decoder).generate(request).tokens
    end = whole[1][2]
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in whole]
    assert cut != whole
    assert (
        engine_of(decoder).generate(replace(request, end_tokens=(end,))).tokens == cut
    )  # the end token included

    first = {tokens[0] for tokens in whole}
    if len(first) == 1:
        at_once = engine_of(decoder).generate(replace(request, end_tokens=(first.pop(),)))
        assert at_once.steps == 0


@pytest.mark.parametrize(("sequence", "step", "position"), [(1, 0, 10), (2, 4, 4)])
def test_logits_that_are_not_finite_are_named(
    decoder: Decoder, sequence: int, step: int, position: int
) -> None:
    """An activation that overflows at one token, in a middle layer."""
    engine = engine_of(decoder)
    engine.generate(Request([[1]], 2))  # sequence ids go on, the request's numbers do not

    def overflow(module: Block, inputs: tuple[Tensor, Rows], output: tuple[Tensor, Rows]) -> None:
        hidden_TD, rows = output
        hidden_TD[(rows.sequence_T == 1 + sequence) & (rows.position_T == position), 3] = torch.inf

    decoder.blocks[1].register_forward_hook(overflow)
    with pytest.raises(WrongResult, match=rf"^sequence {sequence}, step {step} \(0 is .* NaN or infinite"):
        engine.generate(Request(PROMPTS, 6))


BAD_REQUESTS = {
    "nothing": (Request([], 4), "no prompt was given"),
    "no tokens": (Request([[1], []], 4), "prompt 1 is empty; give at least one token"),
    "no new tokens": (Request([[1]], 0), "max_new_tokens is 0; give 1 or more"),
    "too long": (
        Request([[1], [1] * 60], 5),
        "prompt 1 has 60 tokens: with 5 new ones it exceeds the model's 64 positions; shorten it",
    ),
    "unknown token": (Request([[1, 257]], 4), "prompt 0 has token id 257, the vocabulary 257 entries"),
    "negative token": (Request([[1, -1]], 4), "prompt 0 has token id -1, the vocabulary 257 entries"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_request_that_cannot_be_served(tiny_decoder: Callable[..., Decoder], name: str) -> None:
    request, message = BAD_REQUESTS[name]
    with pytest.raises(InputError) as caught:
        engine_of(tiny_decoder()).generate(request)
    assert str(caught.value).startswith(message)


def test_a_checkpoint_in_four_lines(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    tokens = load_model(folder).generate(Request(PROMPTS, 4)).tokens
    assert load_model(str(folder), "cpu", torch.bfloat16).generate(Request(PROMPTS[:1], 2)).steps == 1
    assert [len(each) for each in tokens] == [4] * len(PROMPTS)


def test_the_trace_of_a_run(decoder: Decoder) -> None:
    """Every token but a sequence's last is routed; `record` sees the same, in another order."""
    engine = engine_of(decoder)
    recorder = JobRecorder(engine)
    with record(engine) as recording:
        engine.generate(Request(PROMPTS, 5))
    trace, recorded = recorder.trace(), recording.trace
    order = np.lexsort((recorded.position, recorded.sequence))
    assert np.array_equal(trace.experts, recorded.experts[order])
    assert np.array_equal(trace.phase, recorded.phase[order])
    for sequence, prompt in enumerate(PROMPTS):
        rows = trace.select(trace.sequence == sequence)
        assert rows.position.tolist() == list(range(len(prompt) + 4))
        assert rows.phase.tolist() == [PREFILL] * len(prompt) + [DECODE] * 4

    engine.generate(Request(PROMPTS, 5))  # nobody listens any more
    assert not engine.decoder.listeners


LAYOUT = RoutingLayout("tiny", num_hidden_layers=2, moe_layer_ids=(0, 1), num_experts=8, top_k=1)


def test_parts_of_a_token_are_put_together() -> None:
    """Token 4 was routed by rank 0 in layer 0 and by rank 1 in layer 1; token 3 by both, alike."""
    here = Decisions(np.array([[0, 0, 4, 1], [0, 0, 3, 0], [1, 0, 3, 0]]), np.array([[6], [1], [2]]))
    there = Decisions(np.array([[1, 0, 4, 1], [1, 0, 3, 0]]), np.array([[7], [2]]))
    trace = merge_decisions([here, there], LAYOUT)
    assert trace.position.tolist() == [3, 4]
    assert trace.phase.tolist() == [0, 1]
    assert trace.experts[:, :, 0].tolist() == [[1, 2], [6, 7]]


def test_a_token_must_be_routed_in_every_layer() -> None:
    parts = Decisions(np.array([[0, 0, 3, 0], [0, 0, 4, 0], [1, 0, 3, 0], [1, 0, 5, 0]]), np.array([[1]] * 4))
    with pytest.raises(AssertionError, match="in some layers only"):
        merge_decisions([parts], LAYOUT)
