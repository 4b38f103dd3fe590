"""What configurations say of rotary positions: every spelling, and what models were published with."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exflow.errors import InputError
from exflow.model.config import Rope
from exflow.model.config_file import load_model_config
from exflow.model.families import FAMILIES
from exflow.model.families.rope import RopeConfig
from exflow.model.rotary import Rotary

POSITIONS = torch.tensor([0, 1, 7, 60, 500])
# values that matter: none is a default of a family, or of YaRN
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
WHOLE_YARN = YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.25}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
}
OWN_SIZES = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4},
}
SPELLINGS: dict[str, dict[str, Any]] = {
    "absent": {},
    "theta alone": {"rope_theta": 3000.0},
    "theta, whole number": {"rope_theta": 150000},
    "4: scaling null": {"rope_scaling": None, "rope_theta": 3000.0},
    "4: scaling null, no theta": {"rope_scaling": None},
    "4: scaling empty": {"rope_scaling": {}, "rope_theta": 3000.0},
    "4: scaling": {"rope_scaling": YARN, "rope_theta": 3000.0},
    "4: scaling, no theta": {"rope_scaling": YARN},
    "4: scaling with all keys": {"rope_scaling": WHOLE_YARN, "rope_theta": 3000.0},
    "4: scaling of type": {
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    },
    "4: scaling of both types": {"rope_scaling": YARN | {"type": "default"}, "rope_theta": 3000.0},
    "4: scaling by default": {"rope_scaling": {"rope_type": "default"}, "rope_theta": 3000.0},
    "4: scaling without original positions": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
    "4: factor null": {"rope_scaling": YARN | {"factor": None}, "rope_theta": 3000.0},
    "4: mscale": {"rope_scaling": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}},
    "4: mscale alone": {"rope_scaling": YARN | {"mscale": 0.8}},
    "4: optional keys null": {
        "rope_scaling": YARN | {"attention_factor": None, "beta_fast": None, "beta_slow": None}
    },
    "4: truncate null, betas 0": {
        "rope_scaling": YARN | {"truncate": None, "beta_fast": 0, "beta_slow": 0},
        "rope_theta": 3000.0,
    },
    "4: original positions beside": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "5: parameters null": {"rope_parameters": None},
    "5: parameters null, theta beside": {"rope_parameters": None, "rope_theta": 3000.0},
    "5: parameters empty": {"rope_parameters": {}},
    "5: parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}},
    "5: parameters without type": {"rope_parameters": {"rope_theta": 3000.0}},
    "5: parameters of YaRN": {"rope_parameters": WHOLE_YARN | {"rope_theta": 3000.0}},
    "5: parameters without theta": {"rope_parameters": YARN},
    "5: parameters, theta beside": {"rope_parameters": YARN, "rope_theta": 3000.0},
    "5: parameters, two thetas": {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_theta": 3000.0},
    "5: parameters, theta null beside": {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_theta": None},
    "both": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_scaling": YARN,
        "rope_theta": 3000.0,
    },
    "both, no theta that counts": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_scaling": YARN,
    },
    "both, theta in each": {
        "rope_parameters": YARN | {"rope_theta": 500.0, "factor": 2.0},
        "rope_scaling": YARN | {"rope_theta": 900.0},
    },
    "both, parameters null": {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 3000.0},
    "both, parameters empty": {"rope_parameters": {}, "rope_scaling": YARN, "rope_theta": 3000.0},
    "both, scaling null": {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": None},
    "both, scaling empty": {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": {}},
    "both, scaling by default": {
        "rope_parameters": YARN | {"rope_theta": 500.0},
        "rope_scaling": {"rope_type": "default"},
    },
    "both, both null": {"rope_parameters": None, "rope_scaling": None},
}


def written(folder: Path, family: str, changes: dict[str, Any]) -> dict[str, Any]:
    config = {"model_type": family} | SIZES | OWN_SIZES[family] | changes
    (folder / "config.json").write_text(json.dumps(config))
    return config


def tables_of_transformers(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of POSITIONS [T, C / 2], by the family's own module."""
    transformers = pytest.importorskip("transformers")
    family = config["model_type"]
    read = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))  # it changes what it is given
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = next(value for name, value in vars(modeling).items() if name.endswith("RotaryEmbedding"))
    parts = kind(read)(torch.zeros(1), POSITIONS[None])
    if torch.is_tensor(parts):  # complex numbers
        return parts[0].real, parts[0].imag
    cos, sin = (part[0, :, : len(kind(read).inv_freq)] for part in parts)
    return cos, sin


def assert_same_tables(settings: dict[str, Any], head_dim: int, config: dict[str, Any]) -> None:
    expected = tables_of_transformers(config)
    for ours, theirs in zip(
        Rotary(Rope.model_validate(settings), head_dim).turns(POSITIONS), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_turns_as_in_transformers(family: str, spelling: str, tmp_path: Path) -> None:
    config = written(tmp_path, family, SPELLINGS[spelling])
    rope = load_model_config(tmp_path).rope
    assert rope is not None
    assert_same_tables(rope.model_dump(), 16, config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": WHOLE_YARN | {"rope_theta": 3000.0}}])
def test_what_transformers_saves(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = written(tmp_path, family, changes)
    transformers.AutoConfig.for_model(**json.loads(json.dumps(config))).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    rope = load_model_config(tmp_path).rope
    assert rope is not None
    assert_same_tables(rope.model_dump(), 16, config)


def test_the_spellings_differ() -> None:
    """Otherwise a reader that overlooks one of them would pass."""
    found = {
        json.dumps(RopeConfig.model_validate({"max_position_embeddings": 512} | changes).rope())
        for changes in SPELLINGS.values()
    }
    assert len(found) >= 10


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope_scaling: rope_type 'yarn' needs the key 'factor'; add it",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": None}},
            "rope_parameters: 'full_attention' has settings of its own; layers may not differ in them here",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.type = 'linear': Input should be 'default' or 'yarn'",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type = 'dynamic': Input should be 'default' or 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": None}},
            "rope_parameters.rope_type = None: Input should be 'default' or 'yarn'",
        ),
        ({"rope_theta": None}, "rope_theta is null; give a number, or leave the key out"),
        (
            {"rope_parameters": {"rope_theta": None}},
            "rope_theta is null; give a number, or leave the key out",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor = 0.5: Input should be greater than or equal to 1",
        ),
        ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling.factor = 0: Input should be greater than 0"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_are_refused(
    family: str, changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    written(tmp_path, family, changes)
    with pytest.raises(InputError) as error:
        load_model_config(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: {expected}"


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
