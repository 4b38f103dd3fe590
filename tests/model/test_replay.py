"""Replayed routing: the trace says which experts, the gate how much each counts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exflow.errors import InputError
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.model.replay import ReplayedRouting
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.engine import Engine
from exflow.runtime.request import Request
from exflow.runtime.strategies import single_process
from exflow.runtime.trace_recorder import JobRecorder

CPU = torch.device("cpu")
PROMPTS = [[65, 66, 67], [72, 69, 76, 76, 79, 32], [42], [200] * 7]


def random_trace(lengths: dict[int, int], layers: int = 4, top_k: int = 3, seed: int = 0) -> RoutingTrace:
    """Sequences of the given lengths, by id, whose rows interleave at random; 8 experts, never twice."""
    rng = np.random.default_rng(seed)
    sequence = rng.permutation(np.repeat(list(lengths), list(lengths.values())))
    experts = rng.permuted(np.tile(np.arange(8), (len(sequence), layers, 1)), axis=2)[:, :, :top_k]
    return RoutingTrace.from_arrays(experts, num_experts=8, sequence=sequence, model="other")


def logits(decoder: Decoder) -> Tensor:
    """Return the logits of every choice of a greedy run, in order."""
    seen: list[Tensor] = []
    engine = Engine(decoder, single_process())
    engine.generate(Request(PROMPTS, 6), lambda _, logits_TV: seen.append(logits_TV))
    return torch.cat(seen)


@dataclass(frozen=True)
class Case:
    trace: RoutingTrace
    top_k: int
    sequence: list[int]
    position: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ids = draw(st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True))
    lengths = {number: draw(st.integers(1, 6)) for number in ids}
    tokens = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12))
    trace = random_trace(lengths, seed=draw(st.integers(0, 2**32)))
    return Case(trace, draw(st.integers(1, 3)), [s for s, _ in tokens], [p for _, p in tokens])


@settings(deadline=None)
@given(case=cases())
def test_a_token_has_the_experts_of_its_sequence_and_position_in_the_trace(
    case: Case, tiny_config: Callable[..., ModelConfig]
) -> None:
    replay = ReplayedRouting.of(case.trace, tiny_config(case.top_k), CPU)
    row_T = replay.row_of(torch.tensor(case.sequence).long(), torch.tensor(case.position).long())
    assert replay.expert.is_contiguous()  # kernels read it by address
    ids = sorted(set(case.trace.sequence.tolist()))
    for layer in range(4):
        found = replay.experts(layer, row_T)
        assert found.dtype == torch.int64 and found.shape == (len(case.sequence), case.top_k)
        for token, (sequence, position) in enumerate(zip(case.sequence, case.position, strict=True)):
            rows = case.trace.select(case.trace.sequence == ids[sequence % len(ids)])
            expected = rows.experts[position % rows.num_tokens, layer, : case.top_k]
            assert found[token].tolist() == expected.tolist()


def test_a_trace_may_begin_anywhere(tiny_config: Callable[..., ModelConfig]) -> None:
    """A decode phase alone, say: its first row dictates position 0."""
    experts = np.array([[[3]] * 4, [[5]] * 4])
    trace = RoutingTrace.from_arrays(experts, num_experts=8, position=[17, 18])
    replay = ReplayedRouting.of(trace, tiny_config(), CPU)
    row_T = replay.row_of(torch.tensor([0, 0, 9]), torch.tensor([0, 1, 2]))
    assert replay.experts(2, row_T).tolist() == [[3], [5], [3]]


@pytest.mark.parametrize(
    ("trace", "changes", "message"),
    [
        (
            random_trace({0: 4}, layers=3),
            {},
            "the trace of 'other' has 3 MoE layers, the model 'tiny' 4; replay a trace of a model of the "
            "same shape",
        ),
        (
            random_trace({0: 4}, layers=2),
            {"moe_every": 2, "num_experts": 16},
            "the trace of 'other' has 8 experts a layer, the model 'tiny' 16; replay a trace of a model of "
            "the same shape",
        ),
        (
            random_trace({0: 4}, top_k=1),
            {"top_k": 2},
            "the trace of 'other' has top_k 1, the model 'tiny' 2; replay a trace with as many, or lower "
            "top_k in the model's config.json",
        ),
        (random_trace({0: 0}), {}, "the trace of 'other' holds no tokens; replay another"),
    ],
    ids=["layers", "experts", "choices", "nothing"],
)
def test_a_trace_that_does_not_fit(
    tiny_config: Callable[..., ModelConfig], trace: RoutingTrace, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError) as error:
        ReplayedRouting.of(trace, tiny_config(**changes), CPU)
    assert str(error.value) == message


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_gate_weighs_the_dictated_experts(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder], top_k: int
) -> None:
    router = tiny_decoder(tiny_config(top_k)).blocks[0].mlp.router
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(50, 32, generator=generator)
    expert_TK = torch.rand(50, 8, generator=generator).argsort(dim=1)[:, :top_k]
    routing = router(hidden_TD, expert_TK)
    assert torch.equal(routing.expert_TK, expert_TK)
    probability_TE = (hidden_TD @ router.gate.weight.T).softmax(dim=1)
    chosen_TK = probability_TE.gather(1, expert_TK)
    share_T1 = chosen_TK.sum(dim=1, keepdim=True) if top_k > 1 else 1
    torch.testing.assert_close(routing.weight_TK, chosen_TK / share_T1)
    torch.testing.assert_close(routing.probability_TE, probability_TE)


def test_dictated_experts_without_any_probability_share_it_all_the_same(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder]
) -> None:
    router = tiny_decoder(tiny_config(top_k=2)).blocks[0].mlp.router
    with torch.no_grad():
        router.gate.weight.copy_(torch.arange(8.0)[:, None] * 100)
    routing = router(torch.ones(1, 32), torch.tensor([[0, 1]]))
    assert routing.probability_TE[0, :2].tolist() == [0, 0]
    assert routing.weight_TK.tolist() == [[0, 1]]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 2)], ids=["top1", "top2", "top2-dense"])
def test_replaying_a_models_own_routing_changes_nothing(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder], shape: tuple[int, int]
) -> None:
    decoder = tiny_decoder(tiny_config(*shape))
    recorder = JobRecorder(Engine(decoder, single_process()))
    free = logits(decoder)
    decoder.replay = ReplayedRouting.of(recorder.trace(), decoder.config, CPU)
    assert torch.equal(logits(decoder), free)


def test_another_trace_changes_routing_and_output_until_it_is_taken_away(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder]
) -> None:
    decoder = tiny_decoder(tiny_config(top_k=2))
    free = logits(decoder)
    trace = random_trace({5: 4, 2: 30, 9: 1})
    decoder.replay = ReplayedRouting.of(trace, decoder.config, CPU)
    recorder = JobRecorder(Engine(decoder, single_process()))
    assert (logits(decoder) - free).abs().amax(dim=1).min() > 1e-3  # in every choice
    run, first = recorder.trace(), trace.select(trace.sequence == 2)
    for sequence in (0, 3):  # 3 sequences in the trace: the fourth is dictated by the first again
        experts = run.experts[run.sequence == sequence]
        assert np.array_equal(experts, first.experts[: len(experts), :, :2])
    decoder.replay = None
    assert torch.equal(logits(decoder), free)
