"""Tiny models that the tests of the runtime share. Every fixture here is a factory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from exflow.checkpoint import save_checkpoint
from exflow.config import ModelConfig
from exflow.corpus import SMALLEST_VOCABULARY, train_tokenizer
from exflow.decoder import Decoder, initialise

torch.set_num_threads(1)  # for tensors this small more threads only wait for each other


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
