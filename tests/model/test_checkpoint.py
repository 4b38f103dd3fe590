"""Checkpoints: what is written is read, in part where a part is wanted, and damage is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from exflow.errors import InputError
from exflow.model import checkpoint, stored_weights
from exflow.model.checkpoint import Checkpoint
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from tests.model.checkpoints import load, message, rewrite, save

AGAIN = "copy the checkpoint again, or give another"
W_IN = "blocks.2.mlp.experts.w_in"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


def test_a_saved_model_loads_the_same(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    config = tiny_config(top_k=2, moe_every=2)
    folder = tiny_checkpoint(config, seed=5)
    assert names(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded, saved = load(folder), tiny_decoder(config, seed=5)
    assert loaded.config == config
    assert not loaded.training
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not any(value.requires_grad for value in loaded.parameters())


def test_a_model_of_a_published_shape_loads_the_same(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    config = tiny_config(top_k=2, moe_every=2, head_dim=24, activation="swiglu")
    loaded, saved = load(tiny_checkpoint(config), [[5, 0]] * 2), tiny_decoder(config)
    assert loaded.config == config
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value[[5, 0]] if ".experts." in name else value), name


def test_the_weights_take_the_type_asked_for(folder: Path) -> None:
    decoder = Checkpoint.open(folder).decoder(torch.device("cpu"), torch.bfloat16)
    assert {value.dtype for value in decoder.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.uint8, torch.bfloat16),  # quantised, beside others as they are
    ],
)
def test_the_type_where_nobody_asks_for_one(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig], stored: torch.dtype, chosen: torch.dtype
) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2).to(stored)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, tiny_config(), {}, "gpt-moe")
    assert checkpoint.default_dtype(torch.device("cuda")) == chosen
    assert checkpoint.default_dtype(torch.device("cpu")) == torch.float32


def test_shards(tmp_path: Path, tiny_decoder: Callable[..., Decoder], byte_tokenizer: Tokenizer) -> None:
    decoder, folder = tiny_decoder(), tmp_path / "tiny"
    save(folder, decoder, byte_tokenizer, max_shard_bytes=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 3
    assert names(folder) == ["config.json", *shards, "model.safetensors.index.json", "tokenizer.json"]
    assert index["weight_map"].keys() == decoder.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in decoder.parameters())
    for name, file in index["weight_map"].items():
        assert name in load_file(folder / file)
    for shard in shards:
        tensors = load_file(folder / shard).values()
        assert sum(value.nbytes for value in tensors) <= 40_000 or len(tensors) == 1
    loaded = load(folder, [[7, 1]] * 4).state_dict()
    for name, value in decoder.state_dict().items():
        assert torch.equal(loaded[name], value[[7, 1]] if ".experts." in name else value), name


def test_a_rank_reads_its_experts_slot_by_slot(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    config = tiny_config(moe_every=2)
    experts_here = [[6, 0, 3], [1, 7, 2]]
    part = load(tiny_checkpoint(config), experts_here).state_dict()
    whole = tiny_decoder(config).state_dict()
    for layer, experts in zip(config.moe_layer_ids, experts_here, strict=True):
        for name in (f"blocks.{layer}.mlp.experts.w_in", f"blocks.{layer}.mlp.experts.w_out"):
            assert torch.equal(part[name], whole[name][experts])
    for name in whole.keys() - {name for name in whole if ".experts." in name}:
        assert torch.equal(part[name], whole[name]), name


def test_only_the_experts_wanted_are_read(folder: Path) -> None:
    poisoned = load_file(folder / "model.safetensors")[W_IN]
    poisoned[[0, 1, 2, 4, 5, 7]] = torch.nan
    rewrite(folder, **{W_IN: poisoned})
    assert load(folder, [[3, 6]] * 4).blocks[2].mlp.experts.w_in.isfinite().all()
    expected = f"{folder}/model.safetensors: the weights '{W_IN}' hold NaN or infinite values; {AGAIN}"
    assert message(folder, [[3, 7]] * 4) == expected
    assert message(folder) == expected


class CountingSlice:
    """A tensor in a file, counting the rows that are read."""

    def __init__(self, stored: Any, rows_read: list[int]) -> None:
        self.stored = stored
        self.rows_read = rows_read

    def get_shape(self) -> list[int]:
        shape: list[int] = self.stored.get_shape()
        return shape

    def __getitem__(self, key: slice) -> torch.Tensor:
        value: torch.Tensor = self.stored[key]
        self.rows_read.append(len(value))
        return value


def test_no_more_rows_are_read_than_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_read: list[int] = []
    whole: list[str] = []

    class CountingFile:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = safe_open(path, framework)

        def __enter__(self) -> "CountingFile":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_slice(self, name: str) -> CountingSlice:
            return CountingSlice(self.file.get_slice(name), rows_read)

        def get_tensor(self, name: str) -> torch.Tensor:
            whole.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(stored_weights, "safe_open", CountingFile)
    load(folder, [[2, 5, 0]] * 4)
    assert sum(rows_read) == 4 * 2 * 3  # layers, matrices, experts here
    assert len(whole) == len(set(whole)) and not any(".experts." in name for name in whole)


def test_an_earlier_checkpoint_is_replaced_whole(
    tmp_path: Path, tiny_decoder: Callable[..., Decoder], byte_tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "tiny"
    save(folder, tiny_decoder(seed=1), byte_tokenizer, max_shard_bytes=40_000)
    save(folder, tiny_decoder(seed=2), byte_tokenizer)
    assert names(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert torch.equal(load(folder).embedding.weight, tiny_decoder(seed=2).embedding.weight)
    assert names(tmp_path) == ["tiny"]


def test_a_stop_while_writing_leaves_the_earlier_checkpoint(
    folder: Path,
    tiny_decoder: Callable[..., Decoder],
    byte_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(tensors: dict[str, torch.Tensor]) -> bytes:
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        save(folder, tiny_decoder(seed=2), byte_tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(folder.parent) == [folder.name]


def test_nothing_but_a_checkpoint_is_replaced(
    tmp_path: Path, tiny_decoder: Callable[..., Decoder], byte_tokenizer: Tokenizer
) -> None:
    (tmp_path / "home").mkdir()
    save(tmp_path / "home", tiny_decoder(), byte_tokenizer)  # an empty folder may be taken
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").touch()
    for taken in (thesis, thesis / "chapter.tex"):
        with pytest.raises(InputError) as error:
            save(taken, tiny_decoder(), byte_tokenizer)
        assert str(error.value) == (
            f"{taken}: is something other than a checkpoint; choose another place or remove it"
        )
    assert names(thesis) == ["chapter.tex"]


def test_a_place_that_cannot_be_written(
    tmp_path: Path, tiny_decoder: Callable[..., Decoder], byte_tokenizer: Tokenizer
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "tiny"
    with pytest.raises(InputError) as error:
        save(folder, tiny_decoder(), byte_tokenizer)
    assert str(error.value) == f"{folder}: cannot be written (File exists); choose another place"
