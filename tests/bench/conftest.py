"""A folder with all that `exflow bench decode` reads."""

from collections.abc import Callable
from pathlib import Path

import pytest

from exflow.model.config import ModelConfig
from tests.bench.replayed import shuffled_plan, trace_of


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., ModelConfig]) -> ModelConfig:
    return tiny_config(top_k=2)


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, tiny_checkpoint: Callable[..., Path]
) -> Path:
    """A folder with a checkpoint, a shape alone, a trace, a plan for two ranks, and both of another model."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_checkpoint(config).rename(folder / "model")
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_text((folder / "model" / "config.json").read_text())
    trace_of(config).save(folder / "trace")
    shuffled_plan(config).save(folder / "plan.json")
    other = config.model_copy(update={"num_experts": 16, "name": "other"})
    trace_of(other).save(folder / "other")
    shuffled_plan(other).save(folder / "other.json")
    return folder
