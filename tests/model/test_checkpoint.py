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
from exflow.model import checkpoint
from exflow.model.checkpoint import default_dtype, load_decoder, save_checkpoint
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.model.tokenizer import end_tokens, load_tokenizer, read_tokenizer, train_tokenizer

AGAIN = "copy the checkpoint again, or give another"
W_IN = "blocks.2.mlp.experts.w_in"


def load(folder: Path, experts_here: list[list[int]] | None = None) -> Decoder:
    return load_decoder(folder, torch.device("cpu"), torch.float32, experts_here)


def message(folder: Path, experts_here: list[list[int]] | None = None) -> str:
    with pytest.raises(InputError) as error:
        load(folder, experts_here)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of an unsharded checkpoint; None removes one."""
    state = load_file(folder / "model.safetensors") | changes
    save_file({key: value for key, value in state.items() if value is not None}, folder / "model.safetensors")


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
    decoder = load_decoder(folder, torch.device("cpu"), torch.bfloat16)
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
def test_the_type_where_nobody_asks_for_one(tmp_path: Path, stored: torch.dtype, chosen: torch.dtype) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2).to(stored)}, tmp_path / "model.safetensors")
    assert default_dtype(tmp_path, torch.device("cuda")) == chosen
    assert default_dtype(tmp_path, torch.device("cpu")) == torch.float32


def save(folder: Path, decoder: Decoder, tokenizer: Tokenizer, max_shard_bytes: int = 1 << 20) -> None:
    save_checkpoint(folder, decoder.config, decoder.state_dict(), tokenizer, torch.float32, max_shard_bytes)


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

    monkeypatch.setattr(checkpoint, "safe_open", CountingFile)
    load(folder, [[2, 5, 0]] * 4)
    assert sum(rows_read) == 4 * 2 * 3  # layers, matrices, experts here
    assert len(whole) == len(set(whole)) and not any(".experts." in name for name in whole)


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


def test_the_tokenizer(folder: Path, byte_tokenizer: Tokenizer) -> None:
    assert load_tokenizer(folder).to_str() == byte_tokenizer.to_str()

    path = folder / "tokenizer.json"
    path.write_text('{"version": 1}')
    with pytest.raises(InputError) as error:
        load_tokenizer(folder)
    assert str(error.value).startswith(f"{path}: not a tokenizer (")
    assert str(error.value).endswith(f"; {AGAIN}") and "\n" not in str(error.value)

    train_tokenizer(["the cat sat on the mat\n" * 20], vocab_size=262).save(str(path))
    with pytest.raises(InputError) as error:
        load_tokenizer(folder)
    assert str(error.value) == (
        f"{path}: has token 261, the model's vocab_size is 257: it belongs to another model; copy this "
        "model's there"
    )

    path.unlink()
    with pytest.raises(InputError) as error:
        load_tokenizer(folder)
    assert str(error.value) == f"{path}: no such tokenizer; {AGAIN}"


@pytest.mark.parametrize(
    "left_there",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"truncation": {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 1}},
        {
            "padding": {
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
        {
            "padding": {
                "strategy": "BatchLongest",
                "direction": "Left",
                "pad_to_multiple_of": 8,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
    ],
)
def test_truncation_and_padding_that_were_left_in_a_tokenizer(
    folder: Path, byte_tokenizer: Tokenizer, left_there: dict[str, Any]
) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in left_there.items():
        content[key] = (content[key] or {}) | value
    path.write_text(json.dumps(content))
    prompts = ["a longer prompt", "short"]
    as_stored = Tokenizer.from_file(str(path)).encode_batch(prompts)
    assert [each.ids for each in as_stored] != [each.ids for each in byte_tokenizer.encode_batch(prompts)]


def test_dropout_that_was_left_in_a_tokenizer(folder: Path) -> None:
    """With it a prompt would have other tokens each time."""
    text = "the cat sat on the mat"
    tokenizer = train_tokenizer([f"{text}\n" * 20], vocab_size=300)
    content = json.loads(tokenizer.to_str())
    content["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert {tuple(read_tokenizer(folder).encode(text).ids) for _ in range(5)} == {
        tuple(tokenizer.encode(text).ids)
    }


def test_tokens_that_only_the_configuration_adds(folder: Path) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {
        "258": {"content": "<b>"} | flags,
        "257": {"content": "<a>"} | flags,
        "0": {"content": "!"} | flags,
    }
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"added_tokens_decoder": added}))
    assert read_tokenizer(folder).encode("<b><a>").ids == [258, 257]
    settings.write_text(json.dumps({"added_tokens_decoder": {"300": {"content": "<c>"}}}))
    with pytest.raises(
        InputError, match=r"tokenizer_config\.json: added_tokens_decoder has '<c>' as token 300"
    ):
        read_tokenizer(folder)
    for other in ("[]", "{}", '{"added_tokens_decoder": null}', '{"added_tokens_decoder": {"x": 1, "5": 2}}'):
        settings.write_text(other)
        assert read_tokenizer(folder).get_vocab_size() == 257


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


def test_added_tokens_may_lie_beyond_the_vocabulary(folder: Path) -> None:
    """As where somebody added a token to pad with, and no row to the embedding."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("a[PAD]").ids[-1] == 257


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (2, (2,)),
        ([7, 9], (7, 9)),
        ([7, 1000000000000000019884624838656], (7,)),  # transformers' "very large integer"
        (1000000000000000019884624838656, ()),
        (257, ()),
        (-1, ()),
        ([], ()),
    ],
)
def test_end_tokens_that_the_model_does_not_have(
    tmp_path: Path, byte_tokenizer: Tokenizer, named: Any, expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert end_tokens(tmp_path, byte_tokenizer, 257) == expected


@pytest.mark.parametrize("named", [True, 2.0, "2", [[2]], [None], {"id": 2}])
def test_end_tokens_that_are_none(tmp_path: Path, byte_tokenizer: Tokenizer, named: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id .* is no list of token ids"):
        end_tokens(tmp_path, byte_tokenizer, 257)


def test_the_tokens_that_end_a_text(tmp_path: Path, folder: Path, byte_tokenizer: Tokenizer) -> None:
    """Our own models have one; a Hugging Face folder says it in generation_config.json, or in config.json."""
    assert end_tokens(folder, byte_tokenizer, 257) == (byte_tokenizer.token_to_id("<|endoftext|>"),)
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    config.write_text('{"model_type": "mixtral", "eos_token_id": 2}')
    assert end_tokens(tmp_path, byte_tokenizer, 257) == (2,)
    generation.write_text('{"eos_token_id": [7, 9]}')
    assert end_tokens(tmp_path, byte_tokenizer, 257) == (7, 9)
    generation.write_text("{}")
    assert end_tokens(tmp_path, byte_tokenizer, 257) == (2,)
    config.write_text('{"model_type": "mixtral", "eos_token_id": null}')
    assert end_tokens(tmp_path, byte_tokenizer, 257) == ()
    generation.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError) as error:
        end_tokens(tmp_path, byte_tokenizer, 257)
    assert str(error.value) == f"{generation}: eos_token_id ['</s>'] is no list of token ids; {AGAIN}"


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
