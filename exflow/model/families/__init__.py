"""Hugging Face model families: conversion of their configurations and tensors to ours.

Each family has one file. `settings` of its configuration returns the settings of the equivalent ModelConfig;
`layout` lists the stored tensors of each parameter.
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
    """A family's configuration; `layout(config, names of the stored tensors)` is a checkpoint's layout."""

    config: type[HuggingFaceConfig]
    layout: "Callable[[ModelConfig, Set[str]], Layout]"


FAMILIES = {  # by model_type
    "gpt_oss": Family(gpt_oss.GptOssConfig, gpt_oss.layout),
    "mixtral": Family(mixtral.MixtralConfig, mixtral.layout),
    "olmoe": Family(olmoe.OlmoeConfig, olmoe.layout),
    "qwen3_moe": Family(qwen3_moe.Qwen3MoeConfig, qwen3_moe.layout),
}
