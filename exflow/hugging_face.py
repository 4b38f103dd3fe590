"""Hugging Face models in a local folder: load the model and its tokenizer, for `exflow profile hf:FOLDER`."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from exflow.errors import InputError
from exflow.profiling.hugging_face import HuggingFaceRouting

PREFIX = "hf:"
_TOKENIZER_FILES = ("*tokenizer*", "*vocab*", "*spiece*", "tekken.json")


def load_model(folder: Path, device: torch.device) -> Any:
    """The causal language model in `folder`, in its own precision; spread over the GPUs if there are several.

    Nothing is downloaded, no code of the model's is run, and only safetensors are read.
    Raises InputError where transformers is missing, or the folder holds no whole model with experts that it
    knows.
    """
    transformers = _transformers(folder)
    spread = device.type == "cuda" and torch.cuda.device_count() > 1 and find_spec("accelerate") is not None
    with _loading(folder, "model", "give a folder with a causal language model and its safetensors"):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype="auto",
            device_map="auto" if spread else None,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{folder}: the weights '{missing[0]}' are missing ({len(missing)} in all); copy the model again"
        )
    try:
        HuggingFaceRouting(model)
    except InputError as error:
        raise InputError(f"{folder}: {str(error).removeprefix('record: ')}") from error
    return model.eval() if spread else model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. InputError where there is none: transformers would make up an empty one."""
    transformers = _transformers(folder)
    remedy = "copy the model's tokenizer files there"
    if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise InputError(f"{folder}: holds no tokenizer; {remedy}")
    with _loading(folder, "tokenizer", remedy):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode(tokenizer: Any, texts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The ids of all texts, one after another, without special tokens."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return np.concatenate([np.array(ids, np.int64) for ids in encoded["input_ids"]])


def longest_sequence(model: Any) -> int | None:
    """How many positions the model has, or None where it says no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _transformers(folder: Path) -> Any:
    """The library, once it is sure that there is a model for it."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: holds no config.json, so no Hugging Face model; give a folder that save_pretrained() "
            "or 'hf download NAME --local-dir FOLDER' has filled"
        )
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"{PREFIX}{folder}: transformers is not installed ({error}); pip install 'exflow[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # the command has its own
    transformers.utils.logging.set_verbosity_error()
    return transformers


@contextmanager
def _loading(folder: Path, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder}: the {what} cannot be loaded ({reason}); {remedy}") from error
