"""Hugging Face checkpoints of every family: what transformers computes with them, and how they are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from exflow.model.checkpoint import save_checkpoint
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder
from exflow.model.families import FAMILIES
from tests.model.checkpoints import load, message
from tests.model.published import PROMPTS, assert_as_transformers, config_of, logits_of

AGAIN = "copy the checkpoint again, or give another"
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_computes_what_transformers_does(family: str, made: Callable[[str], Any]) -> None:
    assert_as_transformers(made(family).model, made(family).folder)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": None, "head_dim": 24, "num_experts_per_tok": 1}),
        ("olmoe", {"norm_topk_prob": True, "clip_qkv": None, "attention_bias": True}),
        (
            "qwen3_moe",
            {
                "norm_topk_prob": False,
                "num_experts_per_tok": 3,
                "decoder_sparse_step": 2,
                "mlp_only_layers": None,
                "use_sliding_window": True,
                "sliding_window": 5,
                "attention_bias": True,
                "tie_word_embeddings": True,
                "rope_parameters": YARN,
            },
        ),
        (
            "gpt_oss",
            {
                "attention_bias": False,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                "num_experts_per_tok": 1,
                "rope_parameters": YARN | {"attention_factor": 1.5},
            },
        ),
        ("gpt_oss", {"rope_parameters": None, "swiglu_alpha": 1.0}),
    ],
)
def test_computes_what_transformers_does_with_other_settings(
    hugging_face_model: Callable[..., Any], family: str, changes: dict[str, Any]
) -> None:
    made = hugging_face_model(family, **changes)
    assert_as_transformers(made.model, made.folder)


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("mixtral", {"windows": ()}),
        ("olmoe", {"qkv_clip": None}),
        ("olmoe", {"gate_softmax": "chosen"}),
        ("qwen3_moe", {"gate_softmax": "all"}),
        ("gpt_oss", {"windows": ()}),
        ("gpt_oss", {"swiglu_limit": 7.0}),
        ("gpt_oss", {"swiglu_alpha": 1.0}),
        ("gpt_oss", {"rope": {"theta": 100.0}}),
    ],
)
def test_each_setting_makes_a_difference(
    made: Callable[[str], Any], family: str, without: dict[str, Any]
) -> None:
    """Otherwise the comparison with transformers would show nothing of it."""
    whole = load(made(family).folder)
    other = Decoder(ModelConfig.model_validate(whole.config.model_dump() | without))
    other.load_state_dict(whole.state_dict())
    token_NS = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        assert (logits_of(whole, token_NS) - logits_of(other, token_NS)).abs().max() > 1e-2


@each_family
@pytest.mark.parametrize("options", [{"save_original_format": False}, {"max_shard_size": "40KB"}])
def test_every_layout_that_transformers_saves(
    family: str, options: dict[str, Any], made: Callable[[str], Any], tmp_path: Path
) -> None:
    made(family).model.save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "max_shard_size" not in options
    expected = load(made(family).folder).state_dict()
    found = load(tmp_path, [[6, 0, 6]] * len(load_model_config(tmp_path).moe_layer_ids)).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value[[6, 0, 6]] if ".experts." in name else value), name


@each_family
def test_only_the_experts_wanted_are_read(family: str, made: Callable[[str], Any], tmp_path: Path) -> None:
    """Fill all other experts in the file with NaN: a read of them would be found."""
    made(family).model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    for name, value in state.items():
        _, found, rest = name.partition(".experts.")
        number = rest.partition(".")[0]
        if found and number.isdecimal():
            state[name] = value if number in ("2", "5") else torch.full_like(value, torch.nan)
        elif found:
            value[[0, 1, 3, 4, 6, 7]] = torch.nan
    save_file(state, weights)
    layers = len(load_model_config(tmp_path).moe_layer_ids)
    assert all(value.isfinite().all() for value in load(tmp_path, [[5, 2]] * layers).parameters())
    assert message(tmp_path).startswith(f"{weights}: the weights 'model.layers.0.")
    assert message(tmp_path).endswith(f"' hold NaN or infinite values; {AGAIN}")


@each_family
def test_a_model_saved_as_our_own(
    family: str, made: Callable[[str], Any], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    theirs = load(made(family).folder)
    assert theirs.config.name == family
    save_checkpoint(tmp_path / "own", theirs.config, theirs.state_dict(), byte_tokenizer, torch.float32)
    ours = load(tmp_path / "own")
    assert ours.config == theirs.config
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_published_weights_of_gpt_oss_are_dequantised(made: Callable[[str], Any], tmp_path: Path) -> None:
    """Random blocks, and the same dequantised by transformers."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    generator = torch.Generator().manual_seed(3)
    for folder in (packed, plain):
        made("gpt_oss").model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config_of(folder) | {"intermediate_size": 32}))
    state, numbers = load_file(plain / "model.safetensors"), dict[str, Tensor]()
    blocks = state.copy()
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        rows = 64 if "gate" in name else 32
        each = torch.randint(256, (8, rows, 1, 16), generator=generator, dtype=torch.uint8)
        scale = torch.randint(118, 127, (8, rows, 1), generator=generator, dtype=torch.uint8)
        bias = torch.randn(8, rows, generator=generator)
        numbers |= {name: mxfp4.convert_moe_packed_tensors(each, scale), f"{name}_bias": bias}
        blocks |= {f"{name}_blocks": each, f"{name}_scales": scale, f"{name}_bias": bias}
        del blocks[name]
    save_file(
        {name: value.contiguous() for name, value in (state | numbers).items()}, plain / "model.safetensors"
    )
    save_file(blocks, packed / "model.safetensors")
    quantised = config_of(packed) | {"quantization_config": {"quant_method": "mxfp4"}}
    (packed / "config.json").write_text(json.dumps(quantised))
    expected = load(plain, [[7, 3]] * 3).state_dict()
    for name, value in load(packed, [[7, 3]] * 3).state_dict().items():
        assert torch.equal(value, expected[name]), name
