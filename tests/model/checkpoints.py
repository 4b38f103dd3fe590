"""Reading, listing and changing the files of a checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from exflow.errors import InputError
from exflow.model.checkpoint import Checkpoint, save_checkpoint
from exflow.model.decoder import Decoder


def load(folder: Path, experts_here: list[list[int]] | None = None) -> Decoder:
    return Checkpoint.open(folder).decoder(torch.device("cpu"), torch.float32, experts_here)


def message(folder: Path, experts_here: list[list[int]] | None = None) -> str:
    with pytest.raises(InputError) as error:
        load(folder, experts_here)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of an unsharded checkpoint; None removes one."""
    state = load_file(folder / "model.safetensors") | changes
    save_file({key: value for key, value in state.items() if value is not None}, folder / "model.safetensors")


def save(folder: Path, decoder: Decoder, tokenizer: Tokenizer, max_shard_bytes: int = 1 << 20) -> None:
    save_checkpoint(folder, decoder.config, decoder.state_dict(), tokenizer, torch.float32, max_shard_bytes)
