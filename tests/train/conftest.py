"""A text and the settings of a tiny training run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORDS = ["the", "cat", "dog", "mat", "sat", "saw", "on", "a", "and", "ran"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 lines of random words: which words there are, and how long a line is, can be learnt."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(" ".join(rng.choice(WORDS, 6)) + "\n" for _ in range(800)))
    return path


@pytest.fixture
def settings(text: Path) -> dict[str, Any]:
    """Settings of a tiny run, as its YAML file holds them."""
    return {
        "model": {
            "vocab_size": 280,
            "max_positions": 32,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "intermediate_size": 32,
            "num_experts": 4,
        },
        "data": {"texts": [str(text)], "held_out": 0.1},
        "training": {
            "steps": 8,
            "batch_size": 4,
            "sequence_length": 24,
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "evaluate_tokens": 500,
        },
        "checkpoint_steps": [0, 4],
    }
