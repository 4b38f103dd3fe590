"""Rotary positions of published models, against transformers."""

from typing import Any

import pytest

from exflow.model.families.rope import RopeConfig
from tests.model.rotary_tables import assert_same_tables

DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
GPT_OSS_YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
# the width that is turned, the family, and what the published config.json says that positions depend on
PUBLISHED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        128,
        "mixtral",
        {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 32768, "rope_theta": 1e6},
    ),
    "Mixtral-8x22B": (
        128,
        "mixtral",
        {"hidden_size": 6144, "num_attention_heads": 48, "max_position_embeddings": 65536, "rope_theta": 1e6},
    ),
    "OLMoE-1B-7B": (
        128,
        "olmoe",
        {
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
    ),
    "Qwen3-30B-A3B": (
        128,
        "qwen3_moe",
        {
            "head_dim": 128,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "max_position_embeddings": 40960,
            "rope_scaling": None,
            "rope_theta": 1e6,
        },
    ),
    "Qwen3-30B-A3B, extended as its card says": (
        128,
        "qwen3_moe",
        {
            "head_dim": 128,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "max_position_embeddings": 40960,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
            "rope_theta": 1e6,
        },
    ),
    "Qwen3-235B-A22B-Instruct-2507": (
        128,
        "qwen3_moe",
        {
            "head_dim": 128,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "max_position_embeddings": 262144,
            "rope_scaling": None,
            "rope_theta": 5000000,
        },
    ),
    "gpt-oss-20b": (
        64,
        "gpt_oss",
        {
            "head_dim": 64,
            "hidden_size": 2880,
            "num_attention_heads": 64,
            "max_position_embeddings": 131072,
            "initial_context_length": 4096,
            "rope_scaling": GPT_OSS_YARN,
            "rope_theta": 150000,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        128,
        "qwen2_moe",
        {"hidden_size": 2048, "num_attention_heads": 16, "max_position_embeddings": 8192, "rope_theta": 1e6},
    ),
    "DeepSeek-V2-Lite": (
        64,
        "deepseek_v2",
        {
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "qk_rope_head_dim": 64,
            "max_position_embeddings": 163840,
            "rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            "rope_theta": 10000,
        },
    ),
    "DeepSeek-V3": (
        64,
        "deepseek_v3",
        {
            "hidden_size": 7168,
            "num_attention_heads": 128,
            "qk_rope_head_dim": 64,
            "max_position_embeddings": 163840,
            "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
            "rope_theta": 10000,
        },
    ),
    "Kimi-K2-Instruct": (
        64,
        "deepseek_v3",
        {
            "hidden_size": 7168,
            "num_attention_heads": 64,
            "qk_rope_head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_scaling": DEEPSEEK_YARN
            | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            "rope_theta": 50000.0,
        },
    ),
    "GLM-4.7-Flash": (
        64,
        "glm4_moe_lite",
        {
            "hidden_size": 2048,
            "num_attention_heads": 20,
            "qk_rope_head_dim": 64,
            "max_position_embeddings": 202752,
            "partial_rotary_factor": 1.0,
            "rope_scaling": None,
            "rope_theta": 1000000,
        },
    ),
    "LFM2-8B-A1B": (
        64,
        "lfm2_moe",
        {
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "max_position_embeddings": 128000,
            "rope_theta": 1000000.0,
        },
    ),
    "dots.llm1": (
        128,
        "dots1",
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "max_position_embeddings": 32768,
            "rope_scaling": None,
            "rope_theta": 10000000,
        },
    ),
    "ERNIE-4.5-21B-A3B": (
        128,
        "ernie4_5_moe",
        {
            "hidden_size": 2560,
            "num_attention_heads": 20,
            "max_position_embeddings": 131072,
            "rope_theta": 500000,
        },
    ),
    "granite-3.0-3b-a800m": (
        64,
        "granitemoe",
        {
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "max_position_embeddings": 4096,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
    ),
    "FlexOlmo-7x7B-1T": (
        128,
        "flex_olmo",
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "rope_scaling": None,
            "rope_theta": 500000,
        },
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_turn_as_in_transformers(model: str) -> None:
    """Also those of families that are not run yet: their settings of positions are read all the same."""
    width, family, content = PUBLISHED[model]
    settings = RopeConfig.model_validate(content).rope()
    assert_same_tables(settings, width, {"model_type": family} | content)


def test_many_families_are_tried() -> None:
    assert len({family for _, family, _ in PUBLISHED.values()}) >= 12
