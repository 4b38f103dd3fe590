"""Settings of a training run: the file is read, and what is wrong in it is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from exflow.errors import InputError
from exflow.train.config import load_train_config


def test_the_configuration_of_the_demo_is_read() -> None:
    config = load_train_config(Path(__file__).parents[2] / "configs" / "gpt-moe-demo.yaml")
    assert config.model.name == "gpt-moe-demo"
    assert config.training.steps == max(config.checkpoint_steps)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "training",
            {"lr": 0.1},
            "unknown key 'training.lr'; remove it (known: steps, batch_size, sequence_length, learning_rate, "
            "warmup_steps, weight_decay, balance_weight, gradient_clip, seed, evaluate_tokens)",
        ),
        (
            None,
            {"texts": []},
            "unknown key 'texts'; remove it (known: model, data, training, checkpoint_steps)",
        ),
        ("training", {"steps": 0}, "training.steps = 0: Input should be greater than 0"),
        ("data", {"held_out": 0.9}, "data.held_out = 0.9: Input should be less than 0.5"),
        ("model", {"top_k": 5}, "model: top_k 5 is more than num_experts 4"),
        ("model", {"vocab_size": 256}, "model.vocab_size 256 is not from 257 to 65536"),
        ("model", {"vocab_size": 65537}, "model.vocab_size 65537 is not from 257 to 65536"),
        (
            "training",
            {"sequence_length": 33},
            "training.sequence_length 33 is more than model.max_positions 32",
        ),
        (None, {"checkpoint_steps": [0, 9]}, "checkpoint_steps names step 9, but training.steps is 8"),
    ],
)
def test_a_wrong_setting_is_named(
    settings: dict[str, Any], tmp_path: Path, part: str | None, changes: dict[str, Any], message: str
) -> None:
    (settings[part] if part else settings).update(changes)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError) as error:
        load_train_config(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    "content",
    [
        *(b"model: {a: [1}", b"model:\n\t- 1", b"\xff\xfe", b"a: \x00", b"a: 2001-13-45", b"[" * 20_000),
        *(b"a: &a {b: 1}\nc: *a", b"a: &a 1", b"!!python/object:os.system {}", b"a: " + b"9" * 5000),
    ],
)
def test_a_file_that_is_not_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_train_config(path)
    assert str(error.value).startswith(f"{path}: the configuration is not YAML (")
    assert str(error.value).endswith("); see configs/") and "\n" not in str(error.value)


def test_an_empty_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(InputError) as error:
        load_train_config(path)
    assert str(error.value) == (
        f"{path}: the configuration cannot be read (No such file or directory); see configs/"
    )
    path.touch()
    with pytest.raises(InputError) as error:
        load_train_config(path)
    assert str(error.value) == (
        f"{path}: holds None, not the keys model, data, training, checkpoint_steps; write them"
    )
