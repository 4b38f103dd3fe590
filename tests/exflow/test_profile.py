"""exflow profile: the trace is what the router says, whatever the batches."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from exflow.attention import CausalAttention, rows_of_batch
from exflow.config import ModelConfig
from exflow.decoder import Decoder, MoE, Rows
from exflow.errors import InputError
from exflow.moe import AllExpertsHere
from exflow.profile import profile, profile_hugging_face, profile_text, windows_of_text
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


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> Path:
    """The folder of a tiny Hugging Face model with random weights, and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = tmp_path_factory.mktemp("hugging-face") / "tiny-mixtral"
    save(folder, transformers.MixtralConfig(num_local_experts=8, num_experts_per_tok=2, **TINY))
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer).save_pretrained(folder)
    return folder


TINY = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save(folder: Path, config: Any) -> None:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def profile_mixtral(folder: Path, output: Path, length: int | None = None) -> RoutingTrace:
    (output.parent / "text.txt").write_text(TEXT)
    return profile_text(
        f"hf:{folder}",
        [str(output.parent / "text.txt")],
        output,
        max_tokens=200,
        length=length,
        weights=True,
        device="cpu",
        advance=lambda done, total: None,
    )


def test_a_hugging_face_model_in_a_folder(tmp_path: Path, mixtral: Path, byte_tokenizer: Tokenizer) -> None:
    import transformers

    trace = profile_mixtral(mixtral, tmp_path / "trace", length=20)
    assert (trace.num_tokens, trace.model, trace.num_experts, trace.top_k) == (200, "tiny-mixtral", 8, 2)
    assert trace.sequence.tolist() == [number for number in range(10) for _ in range(20)]
    assert trace.position.tolist() == list(range(20)) * 10

    model = transformers.AutoModelForCausalLM.from_pretrained(mixtral)
    heard: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, output: heard.append(output[0]))
    with torch.no_grad():
        for window in windows_of_text(byte_tokenizer, [TEXT], 20, 200):
            model(input_ids=window[None])
    logits = torch.stack([torch.cat(heard[layer::2]) for layer in range(2)], dim=1)
    assert trace.experts.tolist() == logits.topk(2).indices.tolist()
    assert profile_mixtral(mixtral, tmp_path / "whole").num_tokens == 3 * 64


def test_a_length_that_a_hugging_face_model_has_not(tmp_path: Path, mixtral: Path) -> None:
    with pytest.raises(InputError, match="--length 65: the model has 64 positions; give 64 or less"):
        profile_mixtral(mixtral, tmp_path / "trace", length=65)


def copied(folder: Path, target: Path, without: str) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(without))
    return target


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("config.json", "model: holds no config.json, so no Hugging Face model; give a folder that save_"),
        ("tokenizer*", "model: holds no tokenizer; copy the model's tokenizer files there"),
        ("*.safetensors", "model: the model cannot be loaded .*; give a folder with a causal language model"),
    ],
)
def test_what_a_hugging_face_folder_lacks(tmp_path: Path, mixtral: Path, without: str, message: str) -> None:
    folder = copied(mixtral, tmp_path / "model", without)
    with pytest.raises(InputError, match=message):
        profile_mixtral(folder, tmp_path / "trace")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: holds no config.json, so no Hugging Face model"):
        profile_mixtral(tmp_path / "nowhere", tmp_path / "trace")


def test_weights_that_are_missing_or_damaged(tmp_path: Path, mixtral: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(mixtral, tmp_path / "model", "nothing")
    (weights,) = folder.glob("*.safetensors")
    kept = {name: value for name, value in load_file(weights).items() if "gate.weight" not in name}
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(
        InputError, match=r"model: the weights 'model.layers.0.mlp.gate.* missing \(2 in all\)"
    ):
        profile_mixtral(folder, tmp_path / "trace")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="model: the model cannot be loaded"):
        profile_mixtral(folder, tmp_path / "trace")


def test_a_hugging_face_model_without_experts(tmp_path: Path, mixtral: Path) -> None:
    import transformers

    folder = copied(mixtral, tmp_path / "dense", "*.safetensors")
    save(folder, transformers.LlamaConfig(**TINY))
    with pytest.raises(
        InputError, match="dense: LlamaForCausalLM has no MoE layers that are known: looked for"
    ):
        profile_mixtral(folder, tmp_path / "trace")


def test_a_hugging_face_model_of_another_kind(tmp_path: Path, mixtral: Path) -> None:
    folder = copied(mixtral, tmp_path / "model", "config.json")
    (folder / "config.json").write_text('{"model_type": "switch_transformers"}')
    with pytest.raises(InputError, match=r"model: the model cannot be loaded .*give a folder with a causal"):
        profile_mixtral(folder, tmp_path / "trace")


def test_a_tokenizer_of_another_model(mixtral: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(mixtral)
    with pytest.raises(InputError, match="the tokenizer gives token 257, the model knows 257 tokens"):
        profile_hugging_face(model, torch.tensor([[0, 257]]), None)


def test_without_transformers(tmp_path: Path, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        InputError, match=r"transformers is not installed .*pip install 'exflow\[transformers\]'"
    ):
        profile_mixtral(mixtral, tmp_path / "trace")
