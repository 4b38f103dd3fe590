"""Tables of cosines and sines: ours against those of transformers."""

import importlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from exflow.model.config import Rope
from exflow.model.rotary import Rotary

POSITIONS = torch.tensor([0, 1, 7, 60, 500])


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
