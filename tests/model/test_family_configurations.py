"""Published configurations: those that are read, those that are refused, and defaults."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exflow.errors import InputError
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder
from tests.model.published import config_of

# what was published: the keys that matter, as transformers 4 wrote them
PUBLISHED: dict[str, tuple[dict[str, Any], float, dict[str, Any]]] = {
    "mixtral": (  # Mixtral-8x7B
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        46.7e9,
        {"windows": (), "gate_softmax": "chosen", "rope": {"theta": 1e6, "yarn": None}},
    ),
    "olmoe": (  # OLMoE-1B-7B
        {
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 50304,
        },
        6.92e9,
        {"qk_norm": "width", "gate_softmax": "all", "head_dim": 128},
    ),
    "qwen3_moe": (  # Qwen3-30B-A3B
        {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        30.5e9,
        {"qk_norm": "head", "gate_softmax": "chosen", "intermediate_size": 768, "windows": ()},
    ),
    "gpt_oss": (  # gpt-oss-20b
        {
            "attention_bias": True,
            "head_dim": 64,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "quantization_config": {"quant_method": "mxfp4"},
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "vocab_size": 201088,
        },
        20.9e9,
        {"windows": (128, None) * 12, "activation": "clamped-swiglu", "attention_sinks": True},
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configurations(family: str, tmp_path: Path) -> None:
    content, parameters, expected = PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | content))
    config = load_model_config(tmp_path)
    found = config.model_dump()
    assert {key: found[key] for key in expected} == expected
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(value.numel() for value in decoder.parameters()) == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act = 'gelu': Input should be 'silu' or 'swish'"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts = None: Input should be a valid integer"),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope_parameters.rope_type = 'llama3': Input should be 'default' or 'yarn'",
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor = 0.5: Input should be greater than or equal to 1",
        ),
        (
            "gpt_oss",
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types[0] = 'chunked_attention': Input should be 'sliding_attention' or 'full_attention'",
        ),
        (
            "qwen3_moe",
            {"quantization_config": {"quant_method": "fp8"}},
            "the weights are quantised (fp8), which is not supported; load the model with transformers, "
            "dequantise it, and save_pretrained() it to another folder",
        ),
        (
            "olmoe",
            {"hidden_size": 36},
            "hidden_size 36 is not a multiple of 8, as grouped matrix products need",
        ),
    ],
)
def test_a_configuration_that_is_not_supported(
    made: Callable[[str], Any], tmp_path: Path, family: str, changes: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(made(family).folder) | changes))
    with pytest.raises(InputError) as error:
        load_model_config(tmp_path)
    assert str(error.value) == f"{path}: {expected}"


def test_a_key_that_is_missing(made: Callable[[str], Any], tmp_path: Path) -> None:
    content = config_of(made("qwen3_moe").folder)
    del content["moe_intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="the key 'moe_intermediate_size' is missing; add it"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "absent", "expected"),
    [
        ("mixtral", "num_key_value_heads", 8),
        ("gpt_oss", "num_key_value_heads", 8),
        ("qwen3_moe", "num_key_value_heads", 4),
        ("olmoe", "num_key_value_heads", 16),
        ("mixtral", None, 16),
        ("qwen3_moe", None, 16),
        ("olmoe", None, 16),
    ],
)
def test_key_and_value_heads_by_default(
    family: str, absent: str | None, expected: int, tmp_path: Path
) -> None:
    """A key that is absent has the family's default; null says as many as there are query heads."""
    content = PUBLISHED[family][0] | {"num_attention_heads": 16, "head_dim": 64, "hidden_size": 1024}
    content = {key: value for key, value in content.items() if key != absent}
    if absent is None:
        content["num_key_value_heads"] = None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | content))
    assert load_model_config(tmp_path).num_kv_heads == expected


def test_the_window_of_qwen3_by_default(tmp_path: Path) -> None:
    content = {key: value for key, value in PUBLISHED["qwen3_moe"][0].items() if key != "sliding_window"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe"} | content | {"use_sliding_window": True})
    )
    assert set(load_model_config(tmp_path).windows) == {4096}
