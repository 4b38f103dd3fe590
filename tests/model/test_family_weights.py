"""Weights of published checkpoints: damaged ones, tied heads, and stored buffers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exflow.model.families import FAMILIES
from tests.model.checkpoints import load, message
from tests.model.published import assert_as_transformers, config_of

AGAIN = "copy the checkpoint again, or give another"
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.2.block_sparse_moe.experts.3.w2.weight"),
        ("olmoe", "model.layers.1.self_attn.k_norm.weight"),
        ("qwen3_moe", "model.layers.1.mlp.up_proj.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_weights_that_do_not_fit(made: Callable[[str], Any], tmp_path: Path, family: str, name: str) -> None:
    made(family).model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if key != name}, weights)
    assert message(tmp_path) == f"{tmp_path}: the weights '{name}' are missing; {AGAIN}"
    save_file(state | {"model.layers.9.norm.weight": torch.zeros(3)}, weights)
    assert message(tmp_path) == (
        f"{weights}: config.json implies no weights 'model.layers.9.norm.weight'; {AGAIN}"
    )
    shape = list(state[name].shape)
    save_file(state | {name: torch.zeros(3)}, weights)
    assert message(tmp_path) == f"{weights}: '{name}' has shape [3], config.json implies {shape}; {AGAIN}"


LEFT_OVER = [
    "model.layers.{}.self_attn.rotary_emb.inv_freq",
    "model.layers.{}.self_attn.rotary_emb.cos_cached",
    "model.layers.{}.self_attn.rotary_emb.sin_cached",
    "model.layers.{}.self_attn.masked_bias",
    "model.layers.{}.attn.bias",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "model.embed_tokens.position_ids",
]


@each_family
def test_buffers_that_older_versions_stored(family: str, made: Callable[[str], Any], tmp_path: Path) -> None:
    """Their values do not matter: config.json says what they are."""
    made(family).model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    names = {name.format(layer) for name in LEFT_OVER for layer in range(3)}
    save_file(load_file(weights) | {name: torch.full((3,), torch.nan) for name in names}, weights)
    expected = load(made(family).folder).state_dict()
    for name, value in load(tmp_path).state_dict().items():
        assert torch.equal(value, expected[name]), name


def stored_heads(folder: Path, model: Any, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The model's weights, changed; config.json says that head and embedding are tied."""
    model.save_pretrained(folder)
    config = config_of(folder) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED_HEADS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "a copy": lambda state: state.update({HEAD: state[EMBEDDING].clone()}),
    "a copy of another type": lambda state: state.update(
        {EMBEDDING: state[EMBEDDING].bfloat16().float(), HEAD: state[EMBEDDING].bfloat16()}
    ),
    "the embedding alone": lambda state: state.__delitem__(HEAD),
    "the head alone": lambda state: state.__delitem__(EMBEDDING),
    "another head": lambda state: None,
}


@each_family
@pytest.mark.parametrize("stored", STORED_HEADS)
def test_a_tied_head_as_transformers_reads_it(
    family: str, stored: str, made: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    stored_heads(tmp_path, made(family).model, STORED_HEADS[stored])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_as_transformers(theirs, tmp_path)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("exflow")]
    expected = (
        f"{tmp_path}: config.json says tie_word_embeddings, but '{HEAD}' and '{EMBEDDING}' differ: the "
        "stored head is used; set tie_word_embeddings to false"
    )
    assert set(told) == ({expected} if stored == "another head" else set())
