"""Checkpoints: a folder with `config.json`, `model.safetensors` (sharded if large) and `tokenizer.json`.

Expert weights are stacked, slot after slot, so a rank reads the rows of its own experts and nothing else.
"""

from collections.abc import Iterator, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from exflow.config import ModelConfig, load_model_config
from exflow.decoder import Decoder
from exflow.errors import InputError
from exflow.files import atomic_folder, read_json, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
REMEDY = "copy the checkpoint again, or give another"


def save_checkpoint(
    folder: Path,
    config: ModelConfig,
    state: dict[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    max_shard_bytes: int = 14 << 20,
) -> None:
    """Write a checkpoint folder; it appears whole or not at all, and replaces an earlier one.

    Raises InputError where it cannot be written, or would replace anything but a checkpoint.
    """
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: is something other than a checkpoint; choose another place or remove it")
    with atomic_folder(folder) as staging:
        write_json(staging / CONFIG, config.model_dump())
        (staging / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        stored = {name: value.to("cpu", dtype) for name, value in state.items()}
        _save_weights(staging, stored, max_shard_bytes)


def _save_weights(folder: Path, state: dict[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value.contiguous()
        size += value.nbytes
    if len(shards) == 1:
        (folder / WEIGHTS).write_bytes(save(shards[0]))
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / file).write_bytes(save(shard))
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for value in state.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json` of a checkpoint folder. Raises InputError if it does not fit the model."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer; {REMEDY}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise InputError(f"{path}: not a tokenizer ({error}); {REMEDY}") from error
    known = load_model_config(folder).vocab_size
    if tokenizer.get_vocab_size() > known:
        raise InputError(
            f"{path}: has {tokenizer.get_vocab_size()} tokens, the model's vocab_size is {known}; {REMEDY}"
        )
    return tokenizer


def load_decoder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    experts_here: list[list[int]] | None = None,
) -> Decoder:
    """Build the decoder and read its weights from `folder`.

    experts_here: for each MoE layer the logical expert of each slot of this rank, all with the same number of
    slots; only these experts are read. None reads all of them.
    Raises InputError for a missing, truncated or mismatched file and for weights that are not finite.
    """
    config = load_model_config(folder)
    slots = config.num_experts if experts_here is None else len(experts_here[0])
    with torch.device("meta"):
        decoder = Decoder(config, slots)
    wanted = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    rows = {} if experts_here is None else expert_rows(config, experts_here)
    state = {}
    for name, value in _read_weights(folder, wanted, rows, config.num_experts):
        if not torch.isfinite(value).all():
            raise InputError(f"{folder}: the weights '{name}' hold NaN or infinite values; {REMEDY}")
        state[name] = value.to(device, dtype)
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)


def expert_rows(config: ModelConfig, experts_here: list[list[int]]) -> dict[str, list[int]]:
    """For each expert tensor of a decoder the logical expert in each slot."""
    return {
        f"blocks.{layer}.mlp.experts.{part}": experts
        for layer, experts in zip(config.moe_layer_ids, experts_here, strict=True)
        for part in ("w_in", "w_out")
    }


def _read_weights(
    folder: Path, wanted: dict[str, tuple[int, ...]], rows: dict[str, list[int]], num_experts: int
) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        opened = [stack.enter_context(_open(file)) for file in _weight_files(folder)]
        file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
        _check_names(folder, wanted.keys(), file_of.keys())
        for name, shape in wanted.items():
            stored = file_of[name].get_slice(name)
            expected = [num_experts, *shape[1:]] if name in rows else list(shape)
            if (found := stored.get_shape()) != expected:
                raise InputError(
                    f"{folder}: '{name}' has shape {found}, config.json implies {expected}; {REMEDY}"
                )
            if name in rows:
                yield name, torch.cat([stored[expert : expert + 1] for expert in rows[name]])
            else:
                yield name, file_of[name].get_tensor(name)


def _check_names(folder: Path, wanted: Set[str], stored: Set[str]) -> None:
    if missing := wanted - stored:
        raise InputError(f"{folder}: the weights '{min(missing)}' are missing; {REMEDY}")
    if unknown := stored - wanted:
        raise InputError(f"{folder}: config.json implies no weights '{min(unknown)}'; {REMEDY}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    path = folder / INDEX
    index = read_json(path, "weights", f"a checkpoint has {WEIGHTS}, or shards and {INDEX}")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{path}: the key 'weight_map' does not name a file for each tensor; {REMEDY}")
    return [folder / file for file in sorted(set(weight_map.values()))]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such weights; {REMEDY}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read, truncated? ({error}); {REMEDY}") from error
