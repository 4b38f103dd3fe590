"""Run a model over text and record its routing: the `exflow profile` command."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from exflow.attention import CausalAttention, rows_of_batch
from exflow.checkpoint import load_decoder, load_tokenizer
from exflow.corpus import find_texts, read_text
from exflow.decoder import Decoder
from exflow.device import choose_device
from exflow.errors import InputError
from exflow.moe import AllExpertsHere
from exflow.profiling.record import record
from exflow.profiling.trace import RoutingTrace


def profile_text(
    folder: Path,
    texts: list[str],
    output: Path,
    *,
    max_tokens: int,
    length: int | None,
    weights: bool,
    device: str | None,
    advance: Callable[[int, int], None],
) -> RoutingTrace:
    """Load the model in `folder`, run it over `texts` (files, folders or "{stdlib}"), record to `output`.

    advance: called with the tokens done and the tokens in all.
    """
    files = find_texts(texts)
    tokenizer = load_tokenizer(folder)
    decoder = load_decoder(folder, choose_device(device), torch.float32)
    longest = decoder.config.max_positions
    if length is not None and length > longest:
        raise InputError(f"--length {length}: the model has {longest} positions; give {longest} or less")
    windows = windows_of_text(tokenizer, [read_text(file) for file in files], length or longest, max_tokens)
    return profile(decoder, windows, output, weights, advance=advance)


def windows_of_text(tokenizer: Tokenizer, texts: list[str], length: int, max_tokens: int) -> torch.Tensor:
    """The texts as sequences [N, length] of token ids; a shorter rest is dropped.

    With more text than `max_tokens`, as many windows as fit into it (at least one) are spread evenly over the
    text. Raises InputError where the text does not fill one window.
    """
    ids = np.concatenate([np.array(encoding.ids, np.int64) for encoding in tokenizer.encode_batch(texts)])
    available = len(ids) // length
    count = min(available, max(1, max_tokens // length))
    if not count:
        raise InputError(f"the text has {len(ids)} tokens, one sequence takes {length}; give more text")
    starts = np.linspace(0, available - 1, count).astype(np.int64) * length
    return torch.from_numpy(ids[starts[:, None] + np.arange(length)])


@torch.inference_mode()
def profile(
    decoder: Decoder,
    windows_NS: torch.Tensor,
    path: Path | None,
    weights: bool = False,
    batch_tokens: int = 8192,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> RoutingTrace:
    """Record the routing of every token of `windows_NS` [sequences, length]; streamed to `path` if given.

    advance: called after each batch with the tokens done and the tokens in all.
    """
    device = decoder.embedding.weight.device
    length = windows_NS.shape[1]
    first = 0
    with record(decoder, path, weights=weights) as recorder:
        for batch_BS in torch.split(windows_NS, max(1, batch_tokens // length)):
            rows = rows_of_batch(len(batch_BS), length, device, first_sequence=first)
            decoder(batch_BS.flatten().to(device), rows, CausalAttention(len(batch_BS)), AllExpertsHere())
            first += len(batch_BS)
            advance(first * length, windows_NS.numel())
    return recorder.trace
