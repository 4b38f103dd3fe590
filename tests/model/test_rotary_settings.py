"""Rotary settings of configurations: every spelling, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest

from exflow.errors import InputError
from exflow.model.config_file import load_model_config
from exflow.model.families import FAMILIES
from exflow.model.families.rope import RopeConfig
from tests.model.rotary_tables import assert_same_tables

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
