"""Making, spoiling and profiling the folder of a tiny Hugging Face model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exflow.commands.profile import profile_text
from exflow.errors import InputError
from exflow.profiling.trace import RoutingTrace

TEXT = "".join(chr(ord("a") + number % 26) for number in range(1000))
TINY = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], Any]


def save(folder: Path, config: Any) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def copied(folder: Path, target: Path, without: str) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(without))
    return target


def profile_folder(folder: Path, output: Path, length: int | None = None) -> RoutingTrace:
    (output.parent / "text.txt").write_text(TEXT)
    return profile_text(
        f"hf:{folder}",
        [str(output.parent / "text.txt")],
        output,
        max_tokens=200,
        length=length,
        weights=True,
        device="cpu",
        advance=lambda done, total: None,
    )


def refusal(folder: Path) -> str:
    """The line that refuses a folder, without the folder's own path."""
    with pytest.raises(InputError) as error:
        profile_folder(folder, folder.parent / "trace", length=20)
    assert len(str(error.value)) < 600
    return str(error.value).replace(str(folder), "model")


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def model_type(name: Any) -> Change:
    return lambda folder: change_json(folder / "config.json", model_type=name)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )
