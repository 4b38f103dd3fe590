"""Damaged weights and indexes are refused with file, tensor and remedy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from exflow.model.decoder import Decoder
from tests.model.checkpoints import message, rewrite, save

AGAIN = "copy the checkpoint again, or give another"
W_IN = "blocks.2.mlp.experts.w_in"


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


def test_infinite_weights(folder: Path) -> None:
    rewrite(folder, **{"norm.weight": torch.full((32,), torch.inf)})
    assert message(folder) == (
        f"{folder}/model.safetensors: the weights 'norm.weight' hold NaN or infinite values; {AGAIN}"
    )


def test_missing_weights(folder: Path) -> None:
    rewrite(folder, **{W_IN: None})
    assert message(folder) == f"{folder}: the weights '{W_IN}' are missing; {AGAIN}"
    (folder / "model.safetensors").unlink()
    assert message(folder) == (
        f"{folder}/model.safetensors.index.json: no such weights; a checkpoint has model.safetensors, or "
        "shards and model.safetensors.index.json"
    )


def test_weights_of_a_deeper_model(folder: Path) -> None:
    """A config.json with fewer layers than the weights would otherwise load, as a different model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    name = "blocks.3.attention.norm.bias"
    assert message(folder) == (
        f"{folder}/model.safetensors: config.json implies no weights '{name}'; {AGAIN}"
    )


def test_weights_of_another_shape(folder: Path) -> None:
    rewrite(folder, **{W_IN: torch.zeros(4, 16, 32)})
    expected = (
        f"{folder}/model.safetensors: '{W_IN}' has shape [4, 16, 32], config.json implies [8, 16, 32]; "
        f"{AGAIN}"
    )
    assert message(folder) == expected
    assert message(folder, [[0, 1]] * 4) == expected


@pytest.mark.parametrize("size", [0, 5, 200, 100_000])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert message(folder).startswith(f"{path}: the weights cannot be read, truncated? (")
    assert message(folder).endswith(f"; {AGAIN}")


def test_a_missing_shard(
    tmp_path: Path, tiny_decoder: Callable[..., Decoder], byte_tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "tiny"
    save(folder, tiny_decoder(), byte_tokenizer, max_shard_bytes=100_000)
    shard = sorted(folder.glob("model-00002*"))[0]
    shard.unlink()
    assert message(folder) == f"{shard}: no such weights; {AGAIN}"


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {"norm.weight": 3}}'])
def test_an_index_that_names_no_files(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    assert message(folder) == (f"{index}: the key 'weight_map' does not name a file for each tensor; {AGAIN}")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "..", "a/b", "a\nb", "\ud800", ""]
)
def test_an_index_leads_to_no_other_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    assert message(folder) == (f"{index}: the key 'weight_map' does not name a file for each tensor; {AGAIN}")


@pytest.mark.parametrize(
    "kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool]
)
def test_weights_that_are_no_plain_numbers(folder: Path, kind: torch.dtype) -> None:
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file(state | {W_IN: state[W_IN].to(kind)}, weights)
    assert message(folder) == (
        f"{weights}: '{W_IN}' is stored as {str(kind).removeprefix('torch.')}, which config.json does not "
        "explain; give weights in bfloat16, float16 or float32"
    )
