"""Readers of a model's folder: configurations, weights, tokenizers."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from benchmarks.robustness.fuzz.inputs import Target
from exflow.model.checkpoint import Checkpoint, save_checkpoint
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder
from exflow.model.families import FAMILIES
from exflow.model.tokenizer import SMALLEST_VOCABULARY, train_tokenizer

OWN = {
    "vocab_size": SMALLEST_VOCABULARY,
    "max_positions": 64,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 8,
    "num_experts": 4,
}
THEIRS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [1],
    "sliding_window": 8,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "eos_token_id": [1, 2],
}


def configurations() -> Iterator[Target]:
    own = ModelConfig.model_validate(OWN | {"rope": {"theta": 100.0}, "windows": [4, None]}).model_dump()
    for name, value in (("own", own), *((family, THEIRS | {"model_type": family}) for family in FAMILIES)):
        content = json.dumps(value).encode()
        yield Target(f"config {name}", {"config.json": content}, ("config.json",), load_model_config)


def checkpoints() -> Iterator[Target]:
    """Weights of our own and of each family's layout, whole and in shards; what is beside them."""
    decoder = Decoder(ModelConfig.model_validate(OWN))
    state = {name: torch.zeros_like(value) for name, value in decoder.state_dict().items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
        save_checkpoint(folder, decoder.config, state, tokenizer, torch.float32, 20_000)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def read(folder: Path) -> Decoder:
        return Checkpoint.open(folder).decoder(torch.device("cpu"), torch.float32)

    shards = tuple(name for name in files if name.endswith(".safetensors"))
    yield Target("weights own", files, (*shards, "config.json"), read)
    yield Target("weights index", files, ("model.safetensors.index.json",), read)
    for family in FAMILIES:
        config = json.dumps(THEIRS | {"model_type": family}).encode()
        theirs = {"config.json": config, "model.safetensors": save(_zeros(family, config))}
        yield Target(f"weights {family}", theirs, tuple(theirs), read)
    yield Target("tokenizer", files, ("tokenizer.json",), lambda folder: Checkpoint.open(folder).tokenizer())
    named = files | {"config.json": config, "generation_config.json": b'{"eos_token_id": [1, 2]}'}
    beside = ("generation_config.json", "config.json")
    yield Target("end tokens", named, beside, lambda folder: Checkpoint.open(folder).end_tokens(tokenizer))


def _zeros(family: str, config: bytes) -> dict[str, Any]:
    """The tensors that a family's layout wants."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_bytes(config)
        layout = FAMILIES[family].layout(load_model_config(Path(scratch)), frozenset())
    parts = [part for pieces in layout.values() for piece in pieces for part in piece.parts]
    return {part.name: np.zeros(part.shape, np.float32) for part in parts}
