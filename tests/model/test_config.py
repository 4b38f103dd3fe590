"""config.json: what is read, and what a reader says of a file that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exflow.errors import InputError
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config

KEYS = (
    "model_type, name, vocab_size, max_positions, num_hidden_layers, hidden_size, num_attention_heads, "
    "num_kv_heads, head_dim, intermediate_size, activation, num_experts, top_k, moe_every, dense_layers, "
    "dense_intermediate_size, norm, norm_eps, rope, qk_norm, qkv_clip, windows, attention_bias, "
    "attention_sinks, gate_softmax, gate_bias, expert_bias, swiglu_alpha, swiglu_limit, tied_head"
)
FAMILIES = "give a model of gpt_oss, mixtral, olmoe, qwen3_moe, or one of our own (gpt-moe)"


def write(folder: Path, content: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_what_is_written_is_read(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(top_k=2, moe_every=2)
    assert load_model_config(write(tmp_path, config.model_dump())) == config


def test_derived_numbers(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config()
    assert config.head_dim == 8
    assert config.attention_width == 32
    assert config.kv_width == 2 * 2 * 8
    assert config.moe_layer_ids == (0, 1, 2, 3)
    assert tiny_config(moe_every=2).moe_layer_ids == (1, 3)
    assert tiny_config(moe_every=3).moe_layer_ids == (2,)


def test_heads_may_be_wider_or_narrower_than_their_share(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    config = tiny_config(num_attention_heads=6, num_kv_heads=3, head_dim=24)
    assert (config.attention_width, config.kv_width) == (6 * 24, 2 * 3 * 24)
    assert load_model_config(write(tmp_path, config.model_dump())) == config


def test_a_configuration_of_before_is_read(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> None:
    """An older configuration lacks the keys that came later."""
    content = tiny_config().model_dump()
    del content["head_dim"], content["activation"]
    assert load_model_config(write(tmp_path, content)) == tiny_config(head_dim=8, activation="gelu")


def test_a_configuration_cannot_be_changed(tiny_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny_config().top_k = 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_expert": 8}, f"unknown key 'num_expert'; remove it (known: {KEYS})"),
        ({"num_experts": 0}, "num_experts = 0: Input should be greater than 0"),
        (
            {"num_experts": "eight"},
            "num_experts = 'eight': Input should be a valid integer, unable to parse string as an integer",
        ),
        (
            {"model_type": "bert"},
            f"model_type 'bert' is not supported; {FAMILIES}",
        ),
        (
            {"model_type": 3},
            f"model_type 3 is not supported; {FAMILIES}",
        ),
        ({"head_dim": 0}, "head_dim = 0: Input should be greater than 0"),
        ({"activation": "relu"}, "activation = 'relu': Input should be 'gelu', 'swiglu' or 'clamped-swiglu'"),
        (
            {"num_hidden_layers": 10**12},
            "num_hidden_layers = 1000000000000: Input should be less than or equal to 512",
        ),
        (
            {"num_hidden_layers": 500, "num_experts": 1000},
            "num_experts 1000 in each of num_hidden_layers 500 are more than 65536 in all",
        ),
        ({"rope": {"theta": 1}}, "rope.theta = 1: Input should be greater than 1"),
        ({"num_kv_heads": 3}, "num_attention_heads 4 is not a multiple of num_kv_heads 3"),
        (
            {"intermediate_size": 12},
            "intermediate_size 12 is not a multiple of 8, as grouped matrix products need",
        ),
        ({"top_k": 9}, "top_k 9 is more than num_experts 8"),
        ({"moe_every": 5}, "moe_every 5 leaves no MoE layer among 4 layers"),
        (
            {"moe_every": 2, "dense_layers": [1, 3]},
            "moe_every 2 and dense_layers [1, 3] leaves no MoE layer among 4 layers",
        ),
        ({"windows": [4, None]}, "windows has 2 entries for num_hidden_layers 4"),
        ({"head_dim": 7, "rope": {"theta": 1e4}}, "head_dim 7 is odd; rotary positions turn pairs"),
        (
            {"rope": {"theta": 1e4, "scaling": 2}},
            "unknown key 'rope.scaling'; remove it (known: theta, yarn)",
        ),
        ({"rope": {"yarn": None}}, "the key 'rope.theta' is missing; add it"),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig], changes: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path, tiny_config().model_dump() | changes)
    with pytest.raises(InputError) as error:
        load_model_config(folder)
    assert str(error.value) == f"{folder / 'config.json'}: {message}"


def test_a_width_that_the_heads_do_not_divide(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    content = tiny_config().model_dump() | {"num_attention_heads": 6}
    del content["head_dim"]
    folder = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        load_model_config(folder)
    assert str(error.value) == (
        f"{folder / 'config.json'}: hidden_size 32 is not a multiple of num_attention_heads 6; give head_dim"
    )


def test_a_missing_key_is_named(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> None:
    content = tiny_config().model_dump()
    del content["hidden_size"]
    folder = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        load_model_config(folder)
    assert str(error.value) == f"{folder / 'config.json'}: the key 'hidden_size' is missing; add it"


def test_something_other_than_keys(tmp_path: Path) -> None:
    folder = write(tmp_path, [1, 2])
    with pytest.raises(InputError) as error:
        load_model_config(folder)
    assert str(error.value) == f"{folder / 'config.json'}: holds [1, 2], not the keys {KEYS}; write them"


def test_a_long_value_is_cut_in_the_message(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> None:
    folder = write(tmp_path, tiny_config().model_dump() | {"num_experts": "9" * 10_000 + "\n"})
    with pytest.raises(InputError) as error:
        load_model_config(folder)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_model_config(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'config.json'}: no such model configuration; give the folder of a checkpoint "
        "(config.json, model.safetensors, tokenizer.json)"
    )
