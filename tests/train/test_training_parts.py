"""Parts of training: balance loss, learning rate, batches, bits per byte, and the log of figures."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from exflow.cli.training import TrainingLog
from exflow.model.decoder import Decoder, Routing
from exflow.train.config import OptimiserConfig
from exflow.train.corpus import Corpus
from exflow.train.loop import (
    Progress,
    StepFigures,
    balance_loss,
    busiest_over_mean,
    held_out_bits_per_byte,
    sample_batch,
)
from exflow.train.optimizer import learning_rate


def routing(experts: list[list[int]], probability: list[list[float]]) -> Routing:
    return Routing(
        torch.tensor(experts), torch.ones(len(experts), len(experts[0])), torch.tensor(probability)
    )


def test_balance_of_even_and_of_collapsed_routing() -> None:
    even = routing([[0], [1], [2], [3]], [[0.25] * 4] * 4)
    collapsed = routing([[2]] * 4, [[0.0, 0.0, 1.0, 0.0]] * 4)
    half = routing([[0, 1], [0, 1]], [[0.5, 0.5, 0.0, 0.0]] * 2)
    assert [balance_loss(each).item() for each in (even, collapsed, half)] == [1, 4, 2]
    assert busiest_over_mean([even]).item() == 1
    assert busiest_over_mean([even, collapsed, half]).item() == 4


def test_the_balance_loss_pulls_the_gate_towards_idle_experts() -> None:
    logits_TE = torch.zeros(4, 4, requires_grad=True)
    probability_TE = logits_TE.softmax(dim=-1)
    loss = balance_loss(Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), probability_TE))
    (gradient_TE,) = torch.autograd.grad(loss, logits_TE)
    assert (gradient_TE[:, 0] > 0).all() and (gradient_TE[:, 1:] < 0).all()


def optimizer(**changes: Any) -> OptimiserConfig:
    base = {"steps": 100, "batch_size": 3, "sequence_length": 4, "learning_rate": 1.0, "warmup_steps": 10}
    return OptimiserConfig.model_validate(base | changes)


def test_learning_rate() -> None:
    rates = [learning_rate(optimizer(), step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(optimizer(warmup_steps=0), 0) == 1.0


def test_batches_are_windows_of_the_stream_drawn_from_seed_and_step() -> None:
    stream = np.arange(50, dtype=np.uint16)
    batches = [sample_batch(stream, optimizer(), step) for step in range(200)]
    for batch_BS in batches:
        assert batch_BS.shape == (3, 5)
        assert (batch_BS.diff(dim=1) == 1).all()
    assert torch.stack(batches).unique().tolist() == list(range(50))  # to the first and the last token
    assert torch.equal(batches[7], sample_batch(stream, optimizer(), 7))
    assert not torch.equal(batches[7], batches[8])
    assert not torch.equal(batches[7], sample_batch(stream, optimizer(seed=1), 7))


def test_bits_per_byte_of_a_model_that_knows_nothing(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder()
    decoder.embedding.weight.zero_()  # all scores equal: log2(257) bits a token
    corpus = Corpus(np.zeros(0, np.uint16), np.arange(200, dtype=np.uint16), held_out_bytes=400)
    for evaluate_tokens in (1, 60, 10_000):
        config = optimizer(sequence_length=20, evaluate_tokens=evaluate_tokens)
        found = held_out_bits_per_byte(decoder, corpus, config)
        assert found == pytest.approx(math.log2(257) * 200 / 400)


REPORTS = [
    Progress(0, held_out_bits_per_byte=5.1234),
    Progress(50, StepFigures(loss=3.25, balance=1.5, tokens_per_s=12345.6)),
    Progress(50, held_out_bits_per_byte=2.5),
]


def test_checkpoints_are_noted_and_figures_are_beside_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingLog(steps=100) as log:
        for progress in REPORTS:
            log.report(progress)
        assert (log.task.completed, log.task.total) == (50, 100)
        assert log.task.fields["detail"] == "loss 3.250, busiest expert 1.50x, 12,346 tokens/s"
        assert log.held_out_bits_per_byte == 2.5
    assert capsys.readouterr().err.splitlines() == [
        "exflow: step 0: held-out text takes 5.123 bits per byte",
        "exflow: step 50: held-out text takes 2.500 bits per byte",
    ]
