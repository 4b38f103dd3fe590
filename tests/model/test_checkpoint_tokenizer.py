"""Tokenizer and end tokens of a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from exflow.errors import InputError
from exflow.model.checkpoint import Checkpoint
from exflow.model.config_file import read_config
from exflow.model.tokenizer import end_tokens, read_tokenizer, train_tokenizer

AGAIN = "copy the checkpoint again, or give another"


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


def test_the_tokenizer(folder: Path, byte_tokenizer: Tokenizer) -> None:
    assert Checkpoint.open(folder).tokenizer().to_str() == byte_tokenizer.to_str()

    path = folder / "tokenizer.json"
    path.write_text('{"version": 1}')
    with pytest.raises(InputError) as error:
        Checkpoint.open(folder).tokenizer()
    assert str(error.value).startswith(f"{path}: not a tokenizer (")
    assert str(error.value).endswith(f"; {AGAIN}") and "\n" not in str(error.value)

    train_tokenizer(["the cat sat on the mat\n" * 20], vocab_size=262).save(str(path))
    with pytest.raises(InputError) as error:
        Checkpoint.open(folder).tokenizer()
    assert str(error.value) == (
        f"{path}: has token 261, the model's vocab_size is 257: it belongs to another model; copy this "
        "model's there"
    )

    path.unlink()
    with pytest.raises(InputError) as error:
        Checkpoint.open(folder).tokenizer()
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
    """Dropout would give a prompt other tokens each time."""
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


def test_added_tokens_may_lie_beyond_the_vocabulary(folder: Path) -> None:
    """A common case: a padding token was added to the tokenizer, and no row to the embedding."""
    tokenizer = Checkpoint.open(folder).tokenizer()
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Checkpoint.open(folder).tokenizer().encode("a[PAD]").ids[-1] == 257


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
    assert end_tokens(tmp_path, read_config(tmp_path)[0], byte_tokenizer, 257) == expected


@pytest.mark.parametrize("named", [True, 2.0, "2", [[2]], [None], {"id": 2}])
def test_end_tokens_that_are_none(tmp_path: Path, byte_tokenizer: Tokenizer, named: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id .* is no list of token ids"):
        end_tokens(tmp_path, read_config(tmp_path)[0], byte_tokenizer, 257)


def test_the_tokens_that_end_a_text(tmp_path: Path, folder: Path, byte_tokenizer: Tokenizer) -> None:
    """Our own models have one; a Hugging Face folder says it in generation_config.json, or in config.json."""
    assert Checkpoint.open(folder).end_tokens(byte_tokenizer) == (
        byte_tokenizer.token_to_id("<|endoftext|>"),
    )
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    config.write_text('{"model_type": "mixtral", "eos_token_id": 2}')
    assert end_tokens(tmp_path, read_config(tmp_path)[0], byte_tokenizer, 257) == (2,)
    generation.write_text('{"eos_token_id": [7, 9]}')
    assert end_tokens(tmp_path, read_config(tmp_path)[0], byte_tokenizer, 257) == (7, 9)
    generation.write_text("{}")
    assert end_tokens(tmp_path, read_config(tmp_path)[0], byte_tokenizer, 257) == (2,)
    config.write_text('{"model_type": "mixtral", "eos_token_id": null}')
    assert end_tokens(tmp_path, read_config(tmp_path)[0], byte_tokenizer, 257) == ()
    generation.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError) as error:
        end_tokens(tmp_path, read_config(tmp_path)[0], byte_tokenizer, 257)
    assert str(error.value) == f"{generation}: eos_token_id ['</s>'] is no list of token ids; {AGAIN}"
