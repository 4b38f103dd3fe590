"""Checkpoints: a folder with `config.json`, `model.safetensors` (sharded if large) and `tokenizer.json`.

A checkpoint is our own, with stacked expert weights, or a Hugging Face model of a known family (families). A
rank reads only its own experts.
"""

import logging
from collections.abc import Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from exflow.errors import InputError
from exflow.files import atomic_folder, write_json
from exflow.model.config import ModelConfig
from exflow.model.config_file import CONFIG, OWN, model_config, read_config
from exflow.model.decoder import Decoder
from exflow.model.families import FAMILIES
from exflow.model.families.layout import EMBEDDING, HEAD, Layout, own_layout
from exflow.model.stored_weights import INDEX, WEIGHTS, StoredWeights
from exflow.model.tokenizer import TOKENIZER, check_vocabulary, end_tokens, read_tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose `config.json` has been read.

    settings: the content of `config.json`. model_type: the value of its key `model_type`, or OWN.
    """

    folder: Path
    config: ModelConfig
    settings: Any
    model_type: str

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read `config.json`. Raises InputError if it is missing or wrong, or for an unknown model."""
        settings, model_type = read_config(folder)
        return cls(folder, model_config(folder, settings, model_type), settings, model_type)

    def tokenizer(self) -> Tokenizer:
        """Read `tokenizer.json`. Raises InputError if it does not fit the model."""
        tokenizer = read_tokenizer(self.folder)
        check_vocabulary(tokenizer, self.config.vocab_size, self.folder)
        return tokenizer

    def end_tokens(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids of the tokens that end a text: our end of text, or the ids that a Hugging Face folder names."""
        settings = None if self.model_type == OWN else self.settings
        return end_tokens(self.folder, settings, tokenizer, self.config.vocab_size)

    def default_dtype(self, device: torch.device) -> torch.dtype:
        """The default dtype to compute in: float32 or bfloat16.

        On GPUs it is float32 for float32 and float64 weights, and bfloat16 for all others, also float16 and
        quantised ones. On CPUs it is float32, since few CPUs compute bfloat16 fast. Raises InputError if the
        weights cannot be read.
        """
        if device.type == "cpu":
            return torch.float32
        with ExitStack() as stack:
            full = StoredWeights.of(self.folder, stack).full_precision()
        return torch.float32 if full else torch.bfloat16

    def decoder(
        self, device: torch.device, dtype: torch.dtype, experts_here: list[list[int]] | None = None
    ) -> Decoder:
        """Build the decoder and read its weights.

        experts_here: for each MoE layer the logical expert of each slot of this rank, all with the same
        number of slots; only these experts are read. None reads all of them.
        Raises InputError for a missing, truncated or mismatched file and for weights that are not finite.
        """
        state = {}
        with ExitStack() as stack:
            weights = StoredWeights.of(self.folder, stack)
            config = _with_the_head_stored(self.config, weights)
            if experts_here is None:
                experts_here = [list(range(config.num_experts))] * len(config.moe_layer_ids)
            with torch.device("meta"):
                decoder = Decoder(config, len(experts_here[0]))
            shapes = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
            of_slots = expert_rows(config, experts_here)
            layout = _layout(self.model_type, config, shapes, weights.file_of.keys())
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


def save_checkpoint(
    folder: Path,
    config: ModelConfig,
    state: dict[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    max_shard_bytes: int = 14 << 20,
) -> None:
    """Write a checkpoint folder; it appears whole or not at all, and replaces an earlier one.

    Raises InputError if it cannot be written, or would replace something other than a checkpoint.
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


def expert_rows(config: ModelConfig, experts_here: list[list[int]]) -> dict[str, list[int]]:
    """Map each expert tensor of a decoder, by name, to the logical expert in each of its slots.

    experts_here: the logical expert in each slot, for each MoE layer.
    """
    parts = ("w_in", "w_out", "b_in", "b_out") if config.expert_bias else ("w_in", "w_out")
    return {
        f"blocks.{layer}.mlp.experts.{part}": experts
        for layer, experts in zip(config.moe_layer_ids, experts_here, strict=True)
        for part in parts
    }


def _with_the_head_stored(config: ModelConfig, weights: "StoredWeights") -> ModelConfig:
    """Untie the configuration if the stored head differs from the embedding.

    A head that config.json ties is often stored nevertheless, as a copy of the embedding. If the two differ,
    the weights are right and config.json is wrong; transformers decides likewise
    (modeling_utils.py, `tie_weights`).
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
    model_type: str, config: ModelConfig, shapes: dict[str, tuple[int, ...]], stored: Set[str]
) -> Layout:
    if model_type == OWN:
        return own_layout(config, shapes)
    return FAMILIES[model_type].layout(config, stored)
