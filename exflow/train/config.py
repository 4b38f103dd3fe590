"""Configuration of a training run, read from YAML: model, texts, optimizer, steps to keep."""

from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from exflow.files import read_yaml
from exflow.model.config import ModelConfig, StrictModel
from exflow.model.tokenizer import LARGEST_VOCABULARY, SMALLEST_VOCABULARY
from exflow.validation import validated


class DataConfig(StrictModel):
    """Data of a run. texts: files, folders or "{stdlib}". held_out: share of each file kept for evaluation,
    from its end."""

    texts: list[str] = Field(min_length=1)
    held_out: float = Field(default=0.05, gt=0, lt=0.5)


class OptimiserConfig(StrictModel):
    """AdamW with linear warm-up and cosine decay to a tenth. batch_size: in sequences."""

    steps: PositiveInt
    batch_size: PositiveInt
    sequence_length: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 100
    weight_decay: float = Field(default=0.1, ge=0)
    balance_weight: float = Field(default=0.01, ge=0)
    gradient_clip: PositiveFloat = 1.0
    seed: NonNegativeInt = 0
    evaluate_tokens: PositiveInt = 262144


class TrainConfig(StrictModel):
    """Content of CONFIG in `exflow train CONFIG`; see configs/. The last step's checkpoint is always kept."""

    model: ModelConfig
    data: DataConfig
    training: OptimiserConfig
    checkpoint_steps: tuple[NonNegativeInt, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        vocab_size, positions = self.model.vocab_size, self.model.max_positions
        if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
            raise ValueError(
                f"model.vocab_size {vocab_size} is not from {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}"
            )
        length, steps = self.training.sequence_length, self.training.steps
        if length > positions:
            raise ValueError(
                f"training.sequence_length {length} is more than model.max_positions {positions}"
            )
        last = max(self.checkpoint_steps, default=0)
        if last > steps:
            raise ValueError(f"checkpoint_steps names step {last}, but training.steps is {steps}")
        return self


def load_train_config(path: Path) -> TrainConfig:
    """Read the YAML file of a training run."""
    return validated(TrainConfig, read_yaml(path, "configuration", "see configs/"), path)
