"""Hugging Face model families: their configurations as ours, their tensors as our parameters.

One file a family. `settings` of its configuration are those of the ModelConfig that computes the same;
`layout` says which stored tensors make up each parameter.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exflow.model.families import gpt_oss, mixtral, olmoe, qwen3_moe
from exflow.model.families.config import HuggingFaceConfig
from exflow.model.families.layout import Layout

if TYPE_CHECKING:
    from exflow.model.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """`layout(config, names of the stored tensors)` is the layout of a checkpoint."""

    config: type[HuggingFaceConfig]
    layout: "Callable[[ModelConfig, Set[str]], Layout]"


FAMILIES = {  # by model_type
    "gpt_oss": Family(gpt_oss.GptOssConfig, gpt_oss.layout),
    "mixtral": Family(mixtral.MixtralConfig, mixtral.layout),
    "olmoe": Family(olmoe.OlmoeConfig, olmoe.layout),
    "qwen3_moe": Family(qwen3_moe.Qwen3MoeConfig, qwen3_moe.layout),
}
