"""Choosing tokens: the noise is good, and depends on nothing but the seed and the place."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from exflow.errors import InputError
from exflow.model.sampling import Sampling, choose_tokens, keep_top_p, mix, uniform

logit_rows = st.integers(1, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-8, 8, width=32), min_size=width, max_size=width), min_size=1, max_size=4
    )
)


def places(num_rows: int) -> tuple[Tensor, Tensor]:
    """Sequence and position of rows that are all different."""
    return torch.arange(num_rows) % 7, torch.arange(num_rows) // 7


def random_logits(num_rows: int, vocabulary: int = 11) -> Tensor:
    return 2 * torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(5))


def test_greedy_takes_the_best() -> None:
    logits_TV = random_logits(40)
    chosen_T = choose_tokens(logits_TV, Sampling(), *places(40))
    assert chosen_T.tolist() == logits_TV.argmax(dim=1).tolist()
    assert chosen_T.dtype == torch.int64


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-4])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    logits_TV = random_logits(40)
    for top_p in (1.0, 0.9):
        chosen_T = choose_tokens(logits_TV, Sampling(temperature, top_p), *places(40))
        assert chosen_T.tolist() == logits_TV.argmax(dim=1).tolist()


def test_no_row_no_token() -> None:
    for sampling in (Sampling(), Sampling(1.0, 0.9)):
        assert choose_tokens(torch.empty(0, 5), sampling, *places(0)).tolist() == []


def test_uniform_numbers_are_spread_evenly_over_the_open_interval() -> None:
    draws = uniform(mix(torch.arange(100_000)))
    assert draws.min() > 0 and draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.005)
    deciles = torch.histc(draws, bins=10, min=0, max=1) / len(draws)
    assert deciles.tolist() == pytest.approx([0.1] * 10, abs=0.005)
    neighbours = torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1].item()
    assert abs(neighbours) < 0.02


def test_uniform_numbers_of_the_extreme_bits() -> None:
    ends = uniform(torch.tensor([0, -1]))
    assert ends.tolist() == [2**-53, 1 - 2**-53]


def test_mix_is_the_finaliser_of_splitmix64() -> None:
    """The first outputs of the published generator with seed 1234567; its state grows by `golden`."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + n * golden) % 2**64 for n in range(3)]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    outputs = [value % 2**64 for value in mix(signed).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_tokens_are_drawn_with_their_probability() -> None:
    probability = torch.tensor([0.5, 0.25, 0.125, 0.125])
    for temperature in (1.0, 0.5):
        logits_TV = probability.log().expand(20_000, 4)
        expected = (probability.log() / temperature).softmax(dim=0)
        chosen_T = choose_tokens(logits_TV, Sampling(temperature, seed=3), *places(20_000))
        share = torch.bincount(chosen_T, minlength=4) / 20_000
        assert share.tolist() == pytest.approx(expected.tolist(), abs=0.015)


@given(st.permutations(range(20)), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_a_row_does_not_depend_on_the_others(order: list[int], size: int) -> None:
    logits_TV, (sequence_T, position_T) = random_logits(20), places(20)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=1)
    chosen_T = choose_tokens(logits_TV, sampling, sequence_T, position_T)
    some = order[:size]
    again_T = choose_tokens(logits_TV[some], sampling, sequence_T[some], position_T[some])
    assert again_T.tolist() == chosen_T[some].tolist()


def test_seed_sequence_and_position_each_change_the_noise() -> None:
    logits_TV, zero_T, count_T = torch.zeros(64, 50), torch.zeros(64, dtype=torch.int64), torch.arange(64)
    draws = [
        choose_tokens(logits_TV, Sampling(1.0, seed=seed), sequence_T, position_T).tolist()
        for seed, sequence_T, position_T in [
            (0, zero_T, count_T),
            (1, zero_T, count_T),
            (2**63 - 1, zero_T, count_T),
            (0, count_T, zero_T),
            (0, zero_T + 1, count_T),
        ]
    ]
    for index, one in enumerate(draws):
        assert len(set(one)) > 25  # of 50 entries, by 64 draws
        for other in draws[:index]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def kept_by_hand(scores: list[float], top_p: float) -> list[int]:
    """Take the likeliest until they reach top_p; entries within rounding of it are no test."""
    weights = [math.exp(score) for score in scores]
    kept: list[int] = []
    reached = 0.0
    for entry in sorted(range(len(scores)), key=lambda entry: -scores[entry]):
        assume(abs(reached - top_p) > 1e-5)
        if reached >= top_p:
            break
        kept.append(entry)
        reached += weights[entry] / sum(weights)
    return sorted(kept)


@given(logit_rows, st.floats(0.01, 0.999))
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_the_smallest_set(rows: list[list[float]], top_p: float) -> None:
    kept_TV = keep_top_p(torch.tensor(rows), top_p)
    for scores, kept_V in zip(rows, kept_TV, strict=True):
        kept = kept_V.isfinite().nonzero()[:, 0].tolist()
        assert kept == kept_by_hand(scores, top_p)
        assert kept_V[kept].tolist() == [scores[entry] for entry in kept]


def test_top_p_by_eye() -> None:
    scores_TV = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = {p: keep_top_p(scores_TV, p).isfinite()[0].tolist() for p in (1e-9, 0.5, 0.75, 0.95, 1.0)}
    assert kept == {
        1e-9: [False, True, False, False],
        0.5: [False, True, False, True],
        0.75: [False, True, True, True],
        0.95: [True, True, True, True],
        1.0: [True, True, True, True],
    }


def test_sampling_stays_inside_the_kept_set() -> None:
    logits_TV = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(500, 4)
    chosen_T = choose_tokens(logits_TV, Sampling(1.0, top_p=0.6), *places(500))
    assert set(chosen_T.tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; give 0 (greedy) or more"),
        ({"temperature": math.nan}, "temperature is nan; give 0 (greedy) or more"),
        ({"temperature": math.inf}, "temperature is inf; give 0 (greedy) or more"),
        ({"top_p": 0.0}, "top_p is 0.0, no probability; give more than 0, at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5, no probability; give more than 0, at most 1"),
        ({"top_p": math.nan}, "top_p is nan, no probability; give more than 0, at most 1"),
        ({"seed": -1}, "seed is -1; give 0 to 9223372036854775807"),
        ({"seed": 2**63}, "seed is 9223372036854775808; give 0 to 9223372036854775807"),
    ],
)
def test_settings_out_of_range(sampling: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as error:
        Sampling(**sampling)
    assert str(error.value) == message
