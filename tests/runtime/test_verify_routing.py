"""--verify and near-ties of gates: another choice passes, and is counted, only where scores are as good as
equal."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from exflow.errors import WrongResult
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.model.replay import ReplayedRouting
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.engine import Engine
from exflow.runtime.request import Generation, Request
from exflow.runtime.strategies import single_process
from exflow.runtime.verify import RunRecord, RunRecorder, check_choices
from exflow.runtime.verify_routing import VANISHING, GateScores, count_ties

REQUEST = Request([[65, 66, 67], [72, 69, 76, 76, 79], [42]], 6)
LAST = 9  # the last position of sequence 1 that the run feeds: its routing changes no other choice
LAYER = 3  # the last
ROUTINGS = (3 + 5 + 1 + 3 * 5) * 4  # tokens fed, in 4 layers


def watched(decoder: Decoder, dictated: RoutingTrace | None = None) -> tuple[RunRecord, Generation]:
    """A run, whose gates choose for themselves or are overruled; the decoder's gates are free afterwards."""
    if dictated is not None:
        decoder.replay = ReplayedRouting.of(dictated, decoder.config, torch.device("cpu"))
    engine = Engine(decoder, single_process())
    recorder = RunRecorder(engine, REQUEST)
    generation = engine.generate(REQUEST, recorder.observe)
    decoder.replay = None
    return recorder.gather(), generation


def experts_at_last(trace: RoutingTrace) -> list[int]:
    row = int(((trace.sequence == 1) & (trace.position == LAST)).nonzero()[0][0])
    return [int(expert) for expert in trace.experts[row, LAYER]]


def with_experts_at_last(trace: RoutingTrace, experts: list[int]) -> RoutingTrace:
    changed = trace.experts.copy()
    changed[(trace.sequence == 1) & (trace.position == LAST), LAYER] = experts
    return replace(trace, experts=changed)


def check(decoder: Decoder, recorded: RunRecord, generation: Generation) -> int:
    """The ties."""
    compared = check_choices(recorded, generation, decoder)
    decoder.replay = None
    assert compared.routings == ROUTINGS
    return compared.ties


@pytest.fixture(params=[1, 2], ids=["top-1", "top-2"])
def top_k(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=["all", "chosen"])
def gate_softmax(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def decoder(
    request: pytest.FixtureRequest,
    top_k: int,
    gate_softmax: str,
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
) -> Decoder:
    return tiny_decoder(tiny_config(top_k=top_k, gate_softmax=gate_softmax)).to(request.param)


def gate_row(decoder: Decoder, expert: int) -> torch.Tensor:
    row: torch.Tensor = decoder.blocks[LAYER].mlp.router.gate.weight[expert]
    return row


def test_a_near_tie_is_accepted_and_counted(decoder: Decoder) -> None:
    """An expert that was not chosen gets the gate's row of the last one that was; either may be chosen."""
    chosen = experts_at_last(watched(decoder)[0].trace)
    twin = next(expert for expert in range(8) if expert not in chosen)
    gate_row(decoder, twin).copy_(gate_row(decoder, chosen[-1]) * (1 + 1e-6))
    recorded, generation = watched(decoder)
    ties = check(decoder, recorded, generation)
    assert set(experts_at_last(recorded.trace)) <= {*chosen, twin}
    other = [twin if expert == chosen[-1] else chosen[-1] if expert == twin else expert
             for expert in experts_at_last(recorded.trace)]  # fmt: skip
    turned = watched(decoder, with_experts_at_last(recorded.trace, other))
    assert experts_at_last(turned[0].trace) == other
    assert check(decoder, *turned) == ties + 1


def test_a_wrong_choice_is_named(decoder: Decoder) -> None:
    """The expert whose row is the negative of the best one's has the lowest score of all."""
    chosen = experts_at_last(watched(decoder)[0].trace)
    worst = next(expert for expert in range(8) if expert not in chosen)
    gate_row(decoder, worst).copy_(-gate_row(decoder, chosen[0]))
    right = watched(decoder)[0].trace
    assert experts_at_last(right) == chosen
    wrong = watched(decoder, with_experts_at_last(right, [*chosen[:-1], worst]))
    run, gate = (", ".join(map(str, experts)) for experts in ([*chosen[:-1], worst], chosen))
    place = f"sequence 1, position {LAST}, layer {LAYER}"
    message = (
        rf"{place}: the run chose experts? {run} \(scores .*\), the gate of one process experts? {gate} "
    )
    with pytest.raises(WrongResult, match=message):
        check_choices(*wrong, decoder)


def test_a_wrong_expert_under_right_routing_is_found(decoder: Decoder) -> None:
    recorded, generation = watched(decoder)
    visited = experts_at_last(recorded.trace)[0]
    decoder.blocks[LAYER].mlp.experts.w_out[visited] *= 16
    with pytest.raises(WrongResult, match=r": the logits differ .* with the same routing, .* kernels are at"):
        check_choices(recorded, generation, decoder)


def test_a_replayed_job_is_held_against_its_trace(decoder: Decoder) -> None:
    """Its gates decide nothing: what the trace dictates is right, and anything else is not."""
    free = watched(decoder)[0].trace
    chosen = experts_at_last(free)
    other = [*chosen[:-1], next(expert for expert in range(8) if expert not in chosen)]
    dictated = with_experts_at_last(free, other)
    run = watched(decoder, dictated)
    for trace, right in ((dictated, True), (free, False)):
        decoder.replay = ReplayedRouting.of(trace, decoder.config, torch.device("cpu"))
        if right:
            assert check(decoder, *run) == 0
        else:
            with pytest.raises(WrongResult, match=rf"position {LAST}, layer {LAYER}: .* trace dictates exp"):
                check_choices(*run, decoder)


def gate_scores(scores: list[float], chosen: list[int], size: float = 1.0) -> GateScores:
    return GateScores(5, torch.tensor([chosen]), torch.tensor([scores]), torch.tensor([size]))


@pytest.mark.parametrize(
    ("scores", "chosen", "ties"),
    [
        ([3.0, 2.0, 1.0], [0, 1], 0),
        ([3.0, 2.0, 1.9], [0, 2], 1),
        ([3.0, 2.9, 1.0], [1, 0], 0),  # the same experts, in an order that is as good
        ([3.0, 2.9, 2.8], [1, 2], 1),
        ([0.0, -VANISHING - 1, -VANISHING - 50], [0, 2], 1),  # probabilities next to 0, all alike
    ],
)
def test_ties(scores: list[float], chosen: list[int], ties: int) -> None:
    assert count_ties(0, gate_scores(scores, chosen), 0.0375) == ties


@pytest.mark.parametrize(
    ("scores", "chosen", "size"),
    [
        ([3.0, 2.0, 1.8], [0, 2], 1.0),
        ([3.0, 2.0, 1.9], [0, 2], 0.5),  # rounding errors of small states are small
        ([3.0, 2.0, 1.0], [1, 0], 1.0),
        ([3.0, 2.0, 1.0], [0, 0], 1.0),
        ([3.0, 2.0, float("nan")], [0, 1], 1.0),
    ],
)
def test_no_ties(scores: list[float], chosen: list[int], size: float) -> None:
    with pytest.raises(WrongResult, match="sequence 7, position 0, layer 5: the run chose experts"):
        count_ties(7, gate_scores(scores, chosen, size), 0.0375)
