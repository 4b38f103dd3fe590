"""--verify: what is right passes; a logit, a token, a rank's silence or a counter that is wrong is named."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from exflow.comm.collectives import Counters
from exflow.errors import WrongResult
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.model.sampling import Sampling
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import count_traffic
from exflow.profiling.trace import DECODE, PREFILL
from exflow.runtime.deploy import default_plan
from exflow.runtime.engine import Engine
from exflow.runtime.request import Generation, Request
from exflow.runtime.strategies import single_process
from exflow.runtime.verify import MOST, RunRecord, RunRecorder, Sample, check_choices
from exflow.runtime.verify_counters import check_counters

PROMPTS = [[65, 66, 67], [72, 69, 76, 76, 79], [42]]
REQUEST = Request(PROMPTS, 6)
Watched = tuple[RunRecord, Generation]


def watched(decoder: Decoder, request: Request = REQUEST) -> Watched:
    engine = Engine(decoder, single_process())
    recorder = RunRecorder(engine, request)
    generation = engine.generate(request, recorder.observe)
    return recorder.gather(), generation


@pytest.fixture
def decoder(tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder]) -> Decoder:
    return tiny_decoder(tiny_config(top_k=2))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_run_is_what_its_own_model_says(decoder: Decoder, sampling: Sampling, dtype: torch.dtype) -> None:
    decoder = decoder.to(dtype)
    compared = check_choices(*watched(decoder, replace(REQUEST, sampling=sampling)), decoder)
    assert compared.choices == 18
    assert compared.largest_difference < compared.tolerance
    assert dtype == torch.bfloat16 or compared.largest_difference < 1e-5


def test_another_weight_is_noticed(decoder: Decoder) -> None:
    seen, generation = watched(decoder)
    decoder.blocks[1].attention.out.weight *= 1.01
    with pytest.raises(WrongResult, match=r"sequence 0, step 0 .*: the logits differ .*e-0[123] of the "):
        check_choices(seen, generation, decoder)


def test_logits_that_are_nan_differ(decoder: Decoder) -> None:
    seen, generation = watched(decoder)
    seen.seen[0][2, 3] = seen.seen[0][2, 3] * torch.nan
    with pytest.raises(WrongResult, match=r"sequence 2, step 3 .*: the logits differ .* by nan of"):
        check_choices(seen, generation, decoder)


def test_another_token_is_noticed(decoder: Decoder) -> None:
    """The sequence's last one: after another the logits would differ too."""
    seen, generation = watched(decoder)
    right = generation.tokens[1][5]
    generation.tokens[1][5] = right + 1
    message = rf"sequence 1, step 5 .*: token {right + 1} was chosen, one process chooses {right}, whose"
    with pytest.raises(WrongResult, match=message):
        check_choices(seen, generation, decoder)


def test_a_token_that_rounding_puts_first_will_do(decoder: Decoder) -> None:
    """Equal rows of the embedding give two tokens the same logit; either may be chosen."""
    best = watched(decoder)[1].tokens[2][-1]
    twin = (best + 1) % 257
    decoder.embedding.weight[twin] = decoder.embedding.weight[best]
    seen, generation = watched(decoder)
    generation.tokens[2][-1] = twin if generation.tokens[2][-1] == best else best
    assert check_choices(seen, generation, decoder).choices == 18


def test_a_choice_that_no_rank_made_is_noticed(decoder: Decoder) -> None:
    seen, generation = watched(decoder)
    del seen.seen[0][1, 2]
    with pytest.raises(WrongResult, match=r"sequence 1, step 2 .*: no rank chose its token"):
        check_choices(seen, generation, decoder)


@pytest.mark.parametrize("sequences", [1, 7, 64, 600])
def test_a_sample_is_bounded_and_looks_at_every_sequence(sequences: int) -> None:
    sample = Sample.of(Request([[1]] * sequences, 40))
    chosen = [(number, step) for number in range(sequences) for step in range(40) if (number, step) in sample]
    assert min(40 * sequences, MOST // 2) <= len(chosen) <= MOST
    assert len({number for number, _ in chosen}) == min(sequences, len(chosen))


def counted_right(decoder: Decoder, ranks: int, group: int) -> tuple[Generation, RunRecord]:
    """A generation as a job of so many ranks should have counted it."""
    seen, generation = watched(decoder)
    plan, config = default_plan(decoder.config, Topology(gpus_per_node=ranks)), decoder.config
    counters = []
    for phase, owners in ((PREFILL, 1), (DECODE, group)):
        rows = seen.trace.select(seen.trace.phase == phase)
        sent, copies = count_traffic(rows, plan, owners), count_traffic(rows, plan, group).kv_intra
        counters.append(
            Counters(
                dispatch_intra=sent.dispatch_intra,
                return_intra=sent.return_intra,
                kv_intra=copies,
                hidden_bytes=sent.messages * 4 * config.hidden_size,
                kv_bytes=copies * 4 * config.kv_width,
            )
        )
    return replace(generation, prefill=counters[0], decode=counters[1]), seen


@pytest.mark.parametrize(
    "counter", ["dispatch_intra", "return_inter", "kv_intra", "hidden_bytes", "kv_bytes"]
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_counter_that_is_off_by_one_is_noticed(decoder: Decoder, phase: str, counter: str) -> None:
    generation, seen = counted_right(decoder, ranks=4, group=4)
    plan = default_plan(decoder.config, Topology(gpus_per_node=4))
    check_counters(generation, seen.trace, plan, 4, decoder)
    counters: Counters = getattr(generation, phase)
    setattr(counters, counter, getattr(counters, counter) + 1)
    message = rf"{phase}: the ranks counted {getattr(counters, counter)} {counter}, the routing .* comes to"
    with pytest.raises(WrongResult, match=message):
        check_counters(generation, seen.trace, plan, 4, decoder)


def test_replicated_sends_no_messages(decoder: Decoder) -> None:
    generation, seen = counted_right(decoder, ranks=4, group=4)
    plan = default_plan(decoder.config, Topology(gpus_per_node=4))
    with pytest.raises(WrongResult, match="comes to 0"):
        check_counters(generation, seen.trace, plan, 0, decoder)
    check_counters(replace(generation, prefill=Counters(), decode=Counters()), seen.trace, plan, 0, decoder)
