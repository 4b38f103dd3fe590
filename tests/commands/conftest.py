"""Folders of tiny Hugging Face models; without transformers their tests are skipped."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.commands.hugging_face_folders import MOE, TINY, copied, save


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> Path:
    """The folder of a tiny Hugging Face model with random weights, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hugging-face") / "tiny-mixtral"
    save(folder, transformers.MixtralConfig(num_local_experts=8, num_experts_per_tok=2, **TINY))
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(mixtral: Path) -> Path:
    """A tiny Qwen3-MoE: a family with a head_dim and with experts stored one by one."""
    transformers = pytest.importorskip("transformers")
    folder = copied(mixtral, mixtral.with_name("tiny-qwen"), "*.safetensors")
    save(folder, transformers.Qwen3MoeConfig(**TINY, **MOE))
    return folder


@pytest.fixture
def qwen_copy(tmp_path: Path, qwen: Path) -> Path:
    """A copy of the tiny Qwen3-MoE, to spoil."""
    return copied(qwen, tmp_path / "model", "nothing")
