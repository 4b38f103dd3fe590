"""Tiny models that tests share: every fixture here is a factory. No test reaches another host.

Without a GPU the Triton kernels run in Triton's interpreter, which must be told before they are loaded.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import Tokenizer

from exflow import cli
from exflow.job import outcome
from exflow.model.checkpoint import save_checkpoint
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, initialise
from exflow.model.tokenizer import SMALLEST_VOCABULARY, train_tokenizer

# how long an example takes says nothing where cores are busy
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

runpy.run_path(str(Path(__file__).with_name("no_network.py")))
torch.set_num_threads(1)  # for tensors this small more threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process of the suite ends long after the others."""
    slow = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "distributed")))}
    items.sort(key=lambda item: item.path not in slow)


def _tiny_config(top_k: int = 1, moe_every: int = 1, **changes: Any) -> ModelConfig:
    settings = {
        "name": "tiny",
        "vocab_size": SMALLEST_VOCABULARY,
        "max_positions": 64,
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 16,
        "num_experts": 8,
    }
    return ModelConfig.model_validate(settings | {"top_k": top_k, "moe_every": moe_every} | changes)


def _tiny_decoder(config: ModelConfig | None = None, seed: int = 0) -> Decoder:
    decoder = Decoder(config or _tiny_config())
    initialise(decoder, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() >= 2:
                parameter *= 8  # as large as after training: gates decide, and attention looks somewhere
    return decoder.eval().requires_grad_(False)


# what each family has and others have not; windows are shorter than the texts of the tests
_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "sliding_window": 5},
    "olmoe": {"num_experts": 8, "clip_qkv": 1.5, "norm_topk_prob": False},
    "qwen3_moe": {
        "num_experts": 8,
        "head_dim": 16,
        "moe_intermediate_size": 8,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "head_dim": 16,
        "sliding_window": 5,
        "swiglu_limit": 1.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "beta_fast": 8.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
}


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model of transformers and the folder that it was saved to."""

    folder: Path
    model: Any


def _hugging_face_model(family: str, folder: Path, **changes: Any) -> HuggingFaceModel:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    settings = {
        "vocab_size": SMALLEST_VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
        "eos_token_id": SMALLEST_VOCABULARY - 1,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    config = transformers.AutoConfig.for_model(family, **(settings | _FAMILIES[family] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():  # as large as after training
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(1 + 0.1 * noise if "norm" in name else 0.25 * noise)
    model.save_pretrained(folder)
    return HuggingFaceModel(folder, model)


@pytest.fixture(scope="session")
def hugging_face_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HuggingFaceModel]:
    """hugging_face_model(family, **settings): random weights, 8 experts, saved to a folder of its own."""

    def make(family: str, **changes: Any) -> HuggingFaceModel:
        return _hugging_face_model(family, tmp_path_factory.mktemp("hugging-face") / family, **changes)

    return make


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """tiny_config(top_k=1, moe_every=1, **other_settings): 4 layers, 8 experts, hidden 32."""
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Decoder]:
    """tiny_decoder(config=None, seed=0): random weights, all experts here."""
    return _tiny_decoder


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, and the end of text."""
    return train_tokenizer([], SMALLEST_VOCABULARY)


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer
) -> Callable[..., Path]:
    """tiny_checkpoint(config=None, seed=0): a new checkpoint folder with the weights of tiny_decoder."""

    def write(config: ModelConfig | None = None, seed: int = 0) -> Path:
        decoder = _tiny_decoder(config, seed)
        folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
        save_checkpoint(folder, decoder.config, decoder.state_dict(), byte_tokenizer, torch.float32)
        return folder

    return write


@pytest.fixture(scope="session")
def network() -> Any:
    """The module benchmarks/hosts/network.py: hosts on one machine."""
    from benchmarks.hosts import network

    return network


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """command_line("place trace --gpus 2 ..."), run in this process: exit code, stdout and stderr."""
    monkeypatch.setattr(outcome, "answer_signals", lambda: None)  # pytest's own stay

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["exflow", *line.split()])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run
