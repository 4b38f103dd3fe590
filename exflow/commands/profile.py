"""The `exflow profile` command: runs a model over text and records its routing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from exflow.commands import hugging_face
from exflow.errors import InputError
from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.checkpoint import Checkpoint
from exflow.model.decoder import Decoder
from exflow.model.device import choose_device
from exflow.model.single_process import AllExpertsHere
from exflow.profiling.record import record
from exflow.profiling.trace import RoutingTrace
from exflow.texts import find_texts, read_text

Advance = Callable[[int, int], None]
"""Called after each batch with the number of tokens done, and of all tokens."""

DEFAULT_LENGTH = 2048  # tokens of a sequence; the positions of some models are 100 times as many


def profile_text(
    model: str | Path,
    texts: list[str],
    output: Path,
    *,
    max_tokens: int,
    length: int | None,
    weights: bool,
    device: str | None,
    advance: Advance,
    resume: bool = False,
) -> RoutingTrace:
    """Load a model, run it over `texts` (files, folders or "{stdlib}"), record to `output`.

    model: the folder of a checkpoint, or "hf:" and the folder of a Hugging Face model.
    resume: continue the recording of an interrupted run with equal arguments.
    """
    files = find_texts(texts)
    contents = [read_text(file) for file in files]
    on = choose_device(device)
    if str(model).startswith(hugging_face.PREFIX):
        folder = Path(str(model).removeprefix(hugging_face.PREFIX))
        config = hugging_face.load_config(folder)
        tokenizer = hugging_face.load_tokenizer(folder, config)
        ids = hugging_face.encode(tokenizer, contents)
        longest = hugging_face.longest_sequence(config)
        windows = token_windows(ids, _length(length, longest, DEFAULT_LENGTH), max_tokens)
        source = _source(folder, windows)
        causal_model = hugging_face.load_model(folder, config, on)
        return profile_hugging_face(
            causal_model, windows, output, weights, source=source, resume=resume, advance=advance
        )
    checkpoint = Checkpoint.open(Path(model))
    own_tokenizer, decoder = checkpoint.tokenizer(), checkpoint.decoder(on, torch.float32)
    longest = decoder.config.max_positions
    windows = windows_of_text(own_tokenizer, contents, _length(length, longest, DEFAULT_LENGTH), max_tokens)
    source = _source(Path(model), windows)
    return profile(decoder, windows, output, weights, source=source, resume=resume, advance=advance)


def windows_of_text(tokenizer: Tokenizer, texts: list[str], length: int, max_tokens: int) -> Tensor:
    """The texts as sequences [N, length] int64 of token ids; see token_windows."""
    ids = np.concatenate([np.array(encoding.ids, np.int64) for encoding in tokenizer.encode_batch(texts)])
    return token_windows(ids, length, max_tokens)


def token_windows(ids: npt.NDArray[np.int64], length: int, max_tokens: int) -> Tensor:
    """Cut a stream of token ids into sequences [N, length] int64; a shorter rest is dropped.

    If the text has more than `max_tokens` tokens, as many sequences as fit into max_tokens (at least one) are
    spread evenly over the text. Raises InputError if the text does not fill one sequence.
    """
    available = len(ids) // length
    count = min(available, max(1, max_tokens // length))
    if not count:
        raise InputError(f"the text has {len(ids)} tokens, one sequence takes {length}; give more text")
    starts = np.linspace(0, available - 1, count).astype(np.int64) * length
    return torch.from_numpy(ids[starts[:, None] + np.arange(length)])


def profile(
    decoder: Decoder,
    windows_NS: Tensor,
    path: Path | None,
    weights: bool = False,
    batch_tokens: int = 8192,
    source: str | None = None,
    resume: bool = False,
    advance: Advance = lambda done, total: None,
) -> RoutingTrace:
    """Record the routing of every token of `windows_NS` [sequences, length]; streamed to `path` if given.

    source, resume: as in record().
    """
    device = decoder.embedding.weight.device
    _check_tokens(windows_NS, decoder.config.vocab_size)

    def run(batch_BS: Tensor, first: int) -> None:
        rows = rows_of_batch(len(batch_BS), batch_BS.shape[1], device, first_sequence=first)
        decoder(batch_BS.flatten().to(device), rows, CausalAttention(len(batch_BS)), AllExpertsHere())

    return _record_batches(decoder, run, windows_NS, path, weights, batch_tokens, source, resume, advance)


def profile_hugging_face(
    model: Any,
    windows_NS: Tensor,
    path: Path | None,
    weights: bool = False,
    batch_tokens: int = 8192,
    source: str | None = None,
    resume: bool = False,
    advance: Advance = lambda done, total: None,
) -> RoutingTrace:
    """Record a causal model of transformers as `profile` does. Raises InputError if it has no MoE layers."""
    _check_tokens(windows_NS, model.get_input_embeddings().num_embeddings)
    layers = model.base_model  # without the head, whose logits would take more memory than the model

    def run(batch_BS: Tensor, first: int) -> None:
        layers(input_ids=batch_BS.to(model.device), use_cache=False)

    return _record_batches(model, run, windows_NS, path, weights, batch_tokens, source, resume, advance)


def _check_tokens(windows_NS: Tensor, known: int) -> None:
    if (highest := int(windows_NS.max())) >= known:
        raise InputError(
            f"the tokenizer gives token {highest}, the model knows {known} tokens; give the model its own "
            "tokenizer, or leave out of the text what that token stands for"
        )


@torch.inference_mode()
def _record_batches(
    model: nn.Module,
    run: Callable[[Tensor, int], None],
    windows_NS: Tensor,
    path: Path | None,
    weights: bool,
    batch_tokens: int,
    source: str | None,
    resume: bool,
    advance: Advance,
) -> RoutingTrace:
    """Record `run(batch [B, S], its first sequence id)` for batches of at most `batch_tokens` tokens.

    A batch has at least one sequence.
    """
    length = windows_NS.shape[1]
    with record(model, path, weights=weights, source=source, resume=resume) as recorder:
        first = recorder.resumed
        for batch_BS in torch.split(windows_NS[first:], max(1, batch_tokens // length)):
            run(batch_BS, first)
            first += len(batch_BS)
            advance(first * length, windows_NS.numel())
    return recorder.trace


def _source(model: Path, windows_NS: Tensor) -> str:
    """A digest of the recording: the model's folder and its tokens."""
    sha = hashlib.sha256(json.dumps([str(model.resolve()), *windows_NS.shape]).encode())
    sha.update(windows_NS.numpy().tobytes())
    return sha.hexdigest()


def _length(asked: int | None, longest: int | None, default: int) -> int:
    """The length asked for, or the default, limited to the positions of the model."""
    if longest is None:
        return asked or default
    if asked is not None and asked > longest:
        raise InputError(f"--length {asked}: the model has {longest} positions; give {longest} or less")
    return asked or min(default, longest)
