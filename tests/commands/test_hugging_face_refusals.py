"""Hugging Face folders that are refused: values of config.json, missing files, weights that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.commands.hugging_face_folders import (
    INDEX,
    WEIGHTS,
    Change,
    both,
    change_json,
    drop,
    model_type,
    profile_folder,
    refusal,
    write,
)

transformers = pytest.importorskip("transformers", reason="needs transformers")


# ---- what is wrong with a file is said of that file, in one line

REFUSED_BY_TRANSFORMERS: dict[str, list[Any]] = {
    "head_dim": [None, "8", -8],
    "tie_word_embeddings": [None, "yes", 1],
    "dtype": ["float99", "bf16", 5, "float8_e4m3fn"],
    "hidden_size": [None, "32", 32.0, -32, 10**30],
    "num_hidden_layers": [None, "2", 2.0],
    "num_local_experts": [None, "8"],
    "num_experts_per_tok": [None, "2", 9],
    "num_attention_heads": [None, 0],
    "hidden_act": [None, "swish9", 5],
    "rms_norm_eps": [None, "1e-6"],
    "vocab_size": [None, "257"],
    "max_position_embeddings": [None, "64"],
    "pad_token_id": ["0", 9999],
    "eos_token_id": ["end", {}],
    "use_cache": [None, "yes"],
    "norm_topk_prob": [None],
    "decoder_sparse_step": [0, None],
    "layer_types": [5, ["full_attention"], ["warp", "warp"]],
    "rope_scaling": [
        "yarn",
        [1],
        {"rope_type": "yarn"},
        {"type": "linear"},
        {"rope_type": "linear", "factor": None},
        {"rope_type": "nope", "factor": 2.0},
    ],
    "rope_parameters": [5, {"rope_type": "yarn", "rope_theta": 1e4}, {"rope_type": "nope"}],
    "quantization_config": [5],
    "auto_map": [None],
    "id2label": [5],
    "text_config": [5, {"hidden_size": 8}],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REFUSED_BY_TRANSFORMERS.items() for value in values]
)
def test_values_of_config_json(
    qwen_copy: Path, key: str, value: Any, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    change_json(qwen_copy / "config.json", **{key: value})
    message = refusal(qwen_copy)
    assert message.startswith("model/config.json: ")
    assert message.endswith("; copy the file again, or mend it")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("config.json"),
            "model: holds no config.json, so no Hugging Face model; give a folder that save_",
        ),
        (write("config.json", ""), "model/config.json: the model configuration is not valid JSON"),
        (write("config.json", "{"), "model/config.json: the model configuration is not valid JSON"),
        (write("config.json", "[" * 99999), "model/config.json: the model configuration is not valid JSON"),
        (write("config.json", b"\x80\xff"), "model/config.json: the model configuration is not valid JSON"),
        (write("config.json", "{}".encode("utf-16")), "model/config.json: the model configuration is not va"),
        (write("config.json", "[]"), "model/config.json: says no model_type"),
        (write("config.json", "null"), "model/config.json: says no model_type"),
        (model_type(None), "model/config.json: says no model_type"),
        (model_type(["mixtral"]), "model/config.json: says no model_type"),
        (model_type("llama"), "model: LlamaForCausalLM has no MoE layers that are known: looked for"),
        (drop("tokenizer.json"), "model: holds no tokenizer; copy the model's tokenizer files there"),
        (write("tokenizer.json", ""), "model/tokenizer.json: not a tokenizer"),
        (write("tokenizer.json", "[]"), "model/tokenizer.json: not a tokenizer"),
        (write("tokenizer.json", b"\x80\xff"), "model/tokenizer.json: not a tokenizer"),
        (write("tokenizer.json", '{"version": "9.0"}'), "model/tokenizer.json: not a tokenizer"),
        (
            both(drop("tokenizer.json"), write("vocab.json", "{}"), write("tokenizer_config.json", '{"a": ')),
            "model/tokenizer_config.json: the tokenizer's configuration is not valid JSON",
        ),
        (
            both(drop("tokenizer.json"), write("vocab.json", "{}"), write("tokenizer_config.json", "[]")),
            "model/tokenizer_config.json: is no tokenizer's configuration",
        ),
        (write(WEIGHTS, ""), f"model/{WEIGHTS}: the weights cannot be read, truncated?"),
        (write(WEIGHTS, "garbage" * 99), f"model/{WEIGHTS}: the weights cannot be read, truncated?"),
        (both(drop(WEIGHTS), write(INDEX, "{")), f"model/{INDEX}: "),
        (
            both(drop(WEIGHTS), write(INDEX, "[]")),
            f"model/{INDEX}: the key 'weight_map' does not name a file",
        ),
        (
            both(drop(WEIGHTS), write(INDEX, '{"weight_map": {"a": "../x.safetensors"}}')),
            f"model/{INDEX}: the key 'weight_map' does not name a file",
        ),
        (
            both(drop(WEIGHTS), write(INDEX, '{"weight_map": {"a": "gone.safetensors"}}')),
            "model/gone.safetensors: no such weights",
        ),
    ],
)
def test_files_that_are_missing_or_broken(
    qwen_copy: Path, change: Change, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change(qwen_copy)
    assert refusal(qwen_copy).startswith(message)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["model", "pre_tokenizer", "normalizer", "post_processor", "decoder"])
def test_a_tokenizer_json_newer_than_the_library(qwen_copy: Path, part: str) -> None:
    change_json(qwen_copy / "tokenizer.json", **{part: {"type": "Newer"}})
    assert refusal(qwen_copy).startswith("model/tokenizer.json: not a tokenizer (")


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"zz": 0}, "unk_token": "[UNK]"},
        {"type": "Unigram", "vocab": [["zz", -1.0]], "unk_id": None},
    ],
)
def test_a_tokenizer_that_cannot_encode_the_text(qwen_copy: Path, model: dict[str, Any]) -> None:
    change_json(qwen_copy / "tokenizer.json", model=model)
    assert refusal(qwen_copy).startswith("model/tokenizer.json: the tokenizer cannot encode the text (")


@pytest.mark.parametrize("content", ["{", "[]", "", '{"temperature": "hot", "eos_token_id": "x"}', b"\xff"])
def test_what_is_not_needed_is_not_read(qwen_copy: Path, content: str | bytes) -> None:
    for name in ("generation_config.json", "special_tokens_map.json"):
        write(name, content)(qwen_copy)
    assert profile_folder(qwen_copy, qwen_copy.parent / "trace", length=20).num_tokens == 200


def change_weights(change: Callable[[str, Tensor], Tensor | None]) -> Change:
    def apply(folder: Path) -> None:
        changed = {name: change(name, value) for name, value in load_file(folder / WEIGHTS).items()}
        kept = {name: value for name, value in changed.items() if value is not None}
        save_file(kept, folder / WEIGHTS, {"format": "pt"})

    return apply


def without(part: str) -> Change:
    return change_weights(lambda name, value: None if part in name else value)


def shortened(part: str) -> Change:
    return change_weights(lambda name, value: value[:-1].contiguous() if part in name else value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("gate.weight"),
            "model: the weights 'model.layers.0.mlp.gate.weight' are missing (2 in all)",
        ),
        (without("embed_tokens"), "model: the weights 'model.embed_tokens.weight' are missing (1 in all)"),
        (without("lm_head"), "model: the weights 'lm_head.weight' are missing (1 in all)"),
        (without("experts.3."), "model: the weights 'model.layers.0.mlp.experts.down_proj' have shape [7, "),
        (
            shortened("q_norm"),
            "model: the weights 'model.layers.0.self_attn.q_norm.weight' have shape [7], conf",
        ),
        (
            shortened("embed"),
            "model: the weights 'model.embed_tokens.weight' have shape [256, 32], config.json ",
        ),
        (
            shortened("gate.weight"),
            "model: the weights 'model.layers.0.mlp.gate.weight' have shape [7, 32], c",
        ),
        (shortened("experts.3.up_proj"), "model: the weights cannot be loaded ("),
        (
            lambda folder: change_json(folder / "config.json", vocab_size=300),
            "model: the weights 'lm_head.weig",
        ),
        (
            lambda folder: change_json(folder / "config.json", num_hidden_layers=3),
            "model: the weights 'model.l",
        ),
    ],
)
def test_weights_that_do_not_fit(
    qwen_copy: Path, change: Change, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change(qwen_copy)
    assert refusal(qwen_copy).startswith(message)
    assert capfd.readouterr() == ("", "")


def test_weights_cut_short(qwen_copy: Path) -> None:
    (qwen_copy / WEIGHTS).write_bytes((qwen_copy / WEIGHTS).read_bytes()[:-1])
    assert refusal(qwen_copy).startswith(f"model/{WEIGHTS}: the weights cannot be read, truncated?")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").startswith("model: holds no config.json, so no Hugging Face model")
