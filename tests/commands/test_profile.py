"""exflow profile: the trace is what the router says, whatever the batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from exflow.commands.profile import profile, profile_text, windows_of_text
from exflow.errors import InputError
from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, MoE, Rows
from exflow.model.single_process import AllExpertsHere
from exflow.profiling.trace import PREFILL, RoutingTrace

TEXT = "".join(chr(ord("a") + number % 26) for number in range(1000))


class ByHand(AllExpertsHere):
    """Computes the choice of every layer from the gate's weights, in numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.experts: list[Any] = []
        self.weights: list[Any] = []

    def moe(self, layer: MoE, hidden_TD: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        top_k = layer.router.top_k
        scores = (layer.norm(hidden_TD) @ layer.router.gate.weight.T).double().numpy()
        probability = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        chosen = np.argsort(-probability, axis=1)[:, :top_k]
        weights = np.take_along_axis(probability, chosen, axis=1)
        self.experts.append(chosen)
        self.weights.append(weights if top_k == 1 else weights / weights.sum(axis=1, keepdims=True))
        return super().moe(layer, hidden_TD, rows)


@pytest.mark.parametrize(("top_k", "moe_every", "batch_tokens"), [(1, 1, 8192), (2, 2, 40), (2, 1, 1)])
def test_the_trace_is_the_routing_computed_by_hand(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    top_k: int,
    moe_every: int,
    batch_tokens: int,
) -> None:
    decoder = tiny_decoder(tiny_config(top_k, moe_every))
    windows_NS = torch.randint(257, (5, 16), generator=torch.Generator().manual_seed(2))
    trace = profile(decoder, windows_NS, None, weights=True, batch_tokens=batch_tokens)

    assert trace.sequence.tolist() == [number for number in range(5) for _ in range(16)]
    assert trace.position.tolist() == list(range(16)) * 5
    assert set(trace.phase.tolist()) == {PREFILL}
    assert trace.layout == decoder.routing_layout()
    for number, window_S in enumerate(windows_NS):
        by_hand = ByHand()
        decoder(window_S, rows_of_batch(1, 16, torch.device("cpu")), CausalAttention(1), by_hand)
        here = slice(number * 16, number * 16 + 16)
        assert trace.experts[here].tolist() == np.stack(by_hand.experts, axis=1).tolist()
        assert trace.weights is not None
        np.testing.assert_allclose(trace.weights[here], np.stack(by_hand.weights, axis=1), rtol=2e-3)
    assert len(np.unique(trace.experts)) == 8  # the tiny model uses all its experts


def test_a_trace_on_disk_is_the_one_in_memory(tmp_path: Path, tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder()
    windows_NS = torch.arange(60).reshape(3, 20)
    written = profile(decoder, windows_NS, tmp_path / "trace")
    assert written.weights is None
    assert RoutingTrace.load(tmp_path / "trace").digest() == profile(decoder, windows_NS, None).digest()
    assert not decoder.listeners


def test_progress_is_told_after_every_batch(tiny_decoder: Callable[..., Decoder]) -> None:
    told: list[tuple[int, int]] = []
    windows_NS = torch.zeros(5, 10, dtype=torch.int64)
    profile(
        tiny_decoder(),
        windows_NS,
        None,
        batch_tokens=25,
        advance=lambda done, total: told.append((done, total)),
    )
    assert told == [(20, 50), (40, 50), (50, 50)]


def test_windows_are_spread_evenly_over_the_text(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode(TEXT).ids
    assert len(ids) == 1000
    windows_NS = windows_of_text(byte_tokenizer, [TEXT[:300], TEXT[300:]], length=10, max_tokens=120)
    starts = [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]  # in windows: first and last, equal steps
    assert windows_NS.tolist() == [ids[10 * start : 10 * start + 10] for start in starts]


@pytest.mark.parametrize(("length", "max_tokens", "count"), [(10, 2000, 100), (300, 2000, 3), (300, 5, 1)])
def test_no_more_windows_than_asked_for_or_there_are(
    byte_tokenizer: Tokenizer, length: int, max_tokens: int, count: int
) -> None:
    windows_NS = windows_of_text(byte_tokenizer, [TEXT], length, max_tokens)
    assert windows_NS.shape == (count, length)
    assert len({tuple(window) for window in windows_NS.tolist()}) == min(count, 13)  # the text repeats


def test_a_text_shorter_than_a_window(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as error:
        windows_of_text(byte_tokenizer, ["abc", ""], length=4, max_tokens=100)
    assert str(error.value) == "the text has 3 tokens, one sequence takes 4; give more text"


def test_the_whole_command(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    folder = tiny_checkpoint()

    def run(length: int | None, texts: list[str]) -> RoutingTrace:
        return profile_text(
            folder,
            texts,
            tmp_path / "trace",
            max_tokens=200,
            length=length,
            weights=False,
            device="cpu",
            advance=lambda done, total: None,
        )

    trace = run(length=None, texts=[str(tmp_path)])
    assert (trace.num_tokens, trace.model) == (3 * 64, "tiny")  # 64 positions are the model's longest
    assert run(length=20, texts=[str(tmp_path / "text.txt")]).num_tokens == 200
    with pytest.raises(InputError) as error:
        run(length=65, texts=[str(tmp_path)])
    assert str(error.value) == "--length 65: the model has 64 positions; give 64 or less"


def test_a_token_that_the_model_does_not_know(tiny_decoder: Callable[..., Decoder]) -> None:
    """Refuse a token without a row in the embedding, such as an added token of tokenizer.json."""
    with pytest.raises(InputError, match="the tokenizer gives token 257, the model knows 257 tokens"):
        profile(tiny_decoder(), torch.tensor([[1, 257]]), None)
