"""Loads a Hugging Face model and its tokenizer from a local folder, for `exflow profile hf:FOLDER`.

Nothing is downloaded, no code beside the weights is run, and only safetensors are read. The parts are loaded
one by one, so that an error names the part at fault.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exflow.errors import InputError, out_of_memory
from exflow.files import read_json
from exflow.model.config_file import CONFIG
from exflow.model.stored_weights import INDEX, WEIGHTS, StoredWeights
from exflow.model.tokenizer import TOKENIZER, TOKENIZER_CONFIG, read_tokenizer
from exflow.profiling.hugging_face import HuggingFaceRouting

PREFIX = "hf:"
_TOKENIZER_FILES = ("*tokenizer*", "*vocab*", "*spiece*", "*.tiktoken", "tiktoken.model", "tekken.json")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}  # None would ask whether to run foreign code
_LONGEST_REASON = 300

Encode = Callable[[list[str]], list[list[int]]]
"""The token ids of each text, without special tokens."""


def load_config(folder: Path) -> Any:
    """Read the configuration of the model in `folder`, and check that transformers can build the model.

    Raises InputError if transformers does not know the model or refuses a value (the message names
    config.json), or if the model has no experts.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no {CONFIG}, so no Hugging Face model; give a folder that save_pretrained() "
            "or 'hf download NAME --local-dir FOLDER' has filled"
        )
    transformers = _transformers(folder)
    _check_model_type(path, transformers)
    with _loading(path, "transformers cannot build its model", "copy the file again, or mend it"):
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        # a folder may name kernels to fetch from the hub: foreign code
        config._attn_implementation = config._experts_implementation = None
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    try:
        HuggingFaceRouting(model)
    except InputError as error:
        raise InputError(f"{folder}: {str(error).removeprefix('record: ')}") from error
    return config


def load_tokenizer(folder: Path, config: Any) -> Encode:
    """Load the tokenizer in `folder`: tokenizer.json, else other files through transformers.

    Raises InputError if there are no files: transformers would make an empty tokenizer.
    """
    remedy = "copy the model's tokenizer files there"
    if (path := folder / TOKENIZER).is_file():
        own = read_tokenizer(folder)
        return _checked(
            lambda texts: [each.ids for each in own.encode_batch(texts, add_special_tokens=False)], path
        )
    found = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)})
    files = [file for file in found if file.name != TOKENIZER_CONFIG]
    if not files:
        raise InputError(f"{folder}: holds no tokenizer; {remedy}")
    if (settings := folder / TOKENIZER_CONFIG).is_file() and not isinstance(
        read_json(settings, "tokenizer's configuration", remedy), dict
    ):
        raise InputError(f"{settings}: is no tokenizer's configuration; {remedy}")
    with _loading(files[0], "the tokenizer cannot be loaded", f"copy a {TOKENIZER} there"):
        tokenizer = _transformers(folder).AutoTokenizer.from_pretrained(folder, config=config, **_LOCAL)
    plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return _checked(lambda texts: tokenizer(texts, **plain)["input_ids"], files[0])


def load_model(folder: Path, config: Any, device: torch.device) -> Any:
    """Load the causal language model of `config` in its stored precision, spread over all GPUs.

    Several GPUs need accelerate. Raises InputError if weights are missing, cannot be read, or have wrong
    shapes.
    """
    _check_weights(folder)
    transformers = _transformers(folder)
    spread = device.type == "cuda" and torch.cuda.device_count() > 1 and find_spec("accelerate") is not None
    with _loading(folder, "the weights cannot be loaded", "copy the model again"):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            **_LOCAL,
            use_safetensors=True,
            generation_config=transformers.GenerationConfig(),  # the folder's is not needed
            dtype="auto",
            device_map="auto" if spread else None,
            ignore_mismatched_sizes=True,  # they are reported below
            output_loading_info=True,
        )
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, implied = mismatched[0]
        raise InputError(
            f"{folder}: the weights '{name}' have shape {list(stored)}, {CONFIG} implies {list(implied)} "
            f"({len(mismatched)} in all); copy the model again"
        )
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{folder}: the weights '{missing[0]}' are missing ({len(missing)} in all); copy the model again"
        )
    model = model.eval() if spread else model.to(device).eval()
    with _loading(folder / CONFIG, "the model of it does not run", "copy the file again, or mend it"):
        _try(model)
    return model


def encode(tokenizer: Encode, texts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The ids of all texts, one after another."""
    return np.concatenate([np.array(ids, np.int64) for ids in tokenizer(texts)])


def longest_sequence(config: Any) -> int | None:
    """Number of positions of the model; None if its configuration has no limit."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


@torch.inference_mode()
def _try(model: Any) -> None:
    """Run the model on four tokens: it can be built from contradictory values, such as too large a top-k."""
    model.base_model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=model.device), use_cache=False)


def _check_model_type(path: Path, transformers: Any) -> None:
    found = read_json(path, "model configuration", "copy the file again")
    model_type = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(model_type, str):
        raise InputError(f"{path}: says no model_type; give the folder of a Hugging Face model")
    if model_type not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"{path}: model_type {model_type!r} is not known to transformers {transformers.__version__}, and "
            "code beside the weights is not run; load the model in Python, and record it with exflow.record()"
        )
    if transformers.CONFIG_MAPPING[model_type] not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"{path}: model_type {model_type!r} is no causal language model; give one, or record this model "
            "in Python with exflow.record()"
        )


def _check_weights(folder: Path) -> None:
    """Raise InputError, which names the file, if a file of the weights is missing or cannot be opened."""
    if not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        raise InputError(
            f"{folder}: holds neither {WEIGHTS} nor {INDEX}, and pickled weights (pytorch_model.bin) are not "
            "read; give a folder with safetensors"
        )
    with ExitStack() as stack:
        StoredWeights.of(folder, stack)


def _transformers(folder: Path) -> Any:
    """Import transformers, without its own progress bars and warnings."""
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"{PREFIX}{folder}: transformers is not installed ({error}); pip install 'exflow[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _checked(encode: Encode, path: Path) -> Encode:
    def checked(texts: list[str]) -> list[list[int]]:
        with _loading(path, "the tokenizer cannot encode the text", "copy the model's tokenizer files again"):
            return encode(texts)

    return checked


@contextmanager
def _loading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn any error of a library inside into an InputError about `path`, except a lack of memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        shown = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
        raise InputError(f"{path}: {what} ({shown}); {remedy}") from error
