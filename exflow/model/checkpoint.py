"""Checkpoints: a folder with `config.json`, `model.safetensors` (sharded if large) and `tokenizer.json`.

Ours, whose expert weights are stacked, or a Hugging Face model of a known family (families). Of the experts a
rank reads its own and nothing else.
"""

import logging
import re
from collections.abc import Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from exflow.errors import InputError
from exflow.files import atomic_folder, read_json, write_json
from exflow.model.config import ModelConfig
from exflow.model.config_file import CONFIG, OWN, REMEDY, load_model_config, read_config
from exflow.model.decoder import Decoder
from exflow.model.families import FAMILIES
from exflow.model.families.layout import EMBEDDING, HEAD, LEFT_OVER, Layout, Piece, Stored, own_layout
from exflow.model.tokenizer import TOKENIZER

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")  # a plain name, which leads to no other folder
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # dtypes of weights as they are
PACKED = (torch.uint8,)  # ... of quantised ones
_log = logging.getLogger(__name__)


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
    state = {}
    with ExitStack() as stack:
        weights = StoredWeights.of(folder, stack)
        config = _with_the_head_stored(config, weights)
        if experts_here is None:
            experts_here = [list(range(config.num_experts))] * len(config.moe_layer_ids)
        with torch.device("meta"):
            decoder = Decoder(config, len(experts_here[0]))
        shapes = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
        of_slots = expert_rows(config, experts_here)
        layout = _layout(folder, config, shapes, weights.file_of.keys())
        assert layout.keys() == shapes.keys()
        wanted = {part.name for pieces in layout.values() for each in pieces for part in each.parts}
        weights.check_names(wanted, copies={HEAD} if config.tied_head else set())
        for name, pieces in layout.items():
            if name in of_slots:
                value = torch.stack([weights.read(pieces[expert]) for expert in of_slots[name]])
            else:
                value = weights.read(pieces[0])
            state[name] = value.to(device, dtype)
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)


def default_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """The dtype to compute in where nobody asks for one: on GPUs that of the stored weights.

    There are two: bfloat16 stands for float16 and for quantised weights too. On CPUs it is float32, since few
    compute bfloat16 fast. Raises InputError where the weights cannot be read.
    """
    if device.type == "cpu":
        return torch.float32
    with ExitStack() as stack:
        stored = StoredWeights.of(folder, stack).file_of.items()
        full = all(file.get_slice(name).get_dtype() in ("F32", "F64") for name, (_, file) in stored)
    return torch.float32 if full else torch.bfloat16


def expert_rows(config: ModelConfig, experts_here: list[list[int]]) -> dict[str, list[int]]:
    """For each expert tensor of a decoder the logical expert in each slot."""
    parts = ("w_in", "w_out", "b_in", "b_out") if config.expert_bias else ("w_in", "w_out")
    return {
        f"blocks.{layer}.mlp.experts.{part}": experts
        for layer, experts in zip(config.moe_layer_ids, experts_here, strict=True)
        for part in parts
    }


def _with_the_head_stored(config: ModelConfig, weights: "StoredWeights") -> ModelConfig:
    """The configuration, untied where the weights are.

    A head that config.json ties is often stored all the same, as a copy of the embedding. If it is another
    tensor, the weights are right and config.json is not: so transformers decides
    (modeling_utils.py, `tie_weights`), and so does this.
    """
    both = {HEAD, EMBEDDING} <= weights.file_of.keys()
    if not (config.tied_head and both) or weights.alike(HEAD, EMBEDDING):
        return config
    _log.warning(
        "%s: config.json says tie_word_embeddings, but '%s' and '%s' differ: the stored head is used; set "
        "tie_word_embeddings to false",
        weights.folder,
        HEAD,
        EMBEDDING,
    )
    return config.model_copy(update={"tied_head": False})


def _layout(
    folder: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]], stored: Set[str]
) -> Layout:
    _, model_type = read_config(folder)
    if model_type == OWN:
        return own_layout(config, shapes)
    return FAMILIES[model_type].layout(config, stored)


@dataclass(frozen=True)
class StoredWeights:
    """The opened weights of a checkpoint: for each tensor its file's path, and the file."""

    folder: Path
    file_of: dict[str, tuple[Path, Any]]

    @classmethod
    def of(cls, folder: Path, stack: ExitStack) -> Self:
        """`stack` closes the files."""
        opened = [(path, stack.enter_context(_open(path))) for path in _weight_files(folder)]
        names = {name: (path, file) for path, file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
        return cls(folder, names)

    def alike(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, whatever their types."""
        first, second = (self.file_of[name][1].get_tensor(name) for name in (one, other))
        return first.shape == second.shape and bool((first.float() == second.float()).all())

    def check_names(self, wanted: set[str], copies: set[str]) -> None:
        """Raise InputError unless the weights wanted are here, and beside them only copies and left-overs."""
        if missing := wanted - self.file_of.keys():
            raise InputError(f"{self.folder}: the weights '{min(missing)}' are missing; {REMEDY}")
        spare = self.file_of.keys() - wanted - copies
        if unknown := {name for name in spare if not LEFT_OVER.fullmatch(name)}:
            name = min(unknown)
            raise InputError(f"{self.file_of[name][0]}: config.json implies no weights '{name}'; {REMEDY}")

    def read(self, piece: Piece) -> Tensor:
        return piece.join([self._read(part) for part in piece.parts])

    def _read(self, part: Stored) -> Tensor:
        path, file = self.file_of[part.name]
        stored = file.get_slice(part.name)
        if (found := stored.get_shape()) != list(part.shape):
            raise InputError(
                f"{path}: '{part.name}' has shape {found}, config.json implies {list(part.shape)}; {REMEDY}"
            )
        value: Tensor = file.get_tensor(part.name) if part.row is None else stored[part.row : part.row + 1][0]
        if value.dtype not in (PACKED if part.packed else PLAIN):
            kind = str(value.dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: '{part.name}' is stored as {kind}, which config.json does not explain; give "
                "weights in bfloat16, float16 or float32"
            )
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: the weights '{part.name}' hold NaN or infinite values; {REMEDY}")
        return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    path = folder / INDEX
    index = read_json(path, "weights", f"a checkpoint has {WEIGHTS}, or shards and {INDEX}")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    files = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and _SHARD.fullmatch(file) for file in files):  # beside the index
        raise InputError(f"{path}: the key 'weight_map' does not name a file for each tensor; {REMEDY}")
    return [folder / file for file in sorted(set(files))]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such weights; {REMEDY}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read, truncated? ({error}); {REMEDY}") from error
