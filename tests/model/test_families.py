"""Hugging Face checkpoints of every family: what transformers computes with them, and how they are read."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from exflow.errors import InputError
from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.checkpoint import load_decoder, save_checkpoint
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder, Rows
from exflow.model.families import FAMILIES
from exflow.model.single_process import AllExpertsHere
from exflow.runtime.deploy import load_model
from exflow.runtime.request import Request

CPU = torch.device("cpu")
AGAIN = "copy the checkpoint again, or give another"
PROMPTS = [[65, 66, 67], [72, 69, 76, 76, 79, 32, 87, 79, 82, 76, 68], [42]]
NEW = 12
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def made(hugging_face_model: Callable[..., Any]) -> Callable[[str], Any]:
    """The model of each family, made once; its folder is not to be changed."""
    return cache(hugging_face_model)


def load(folder: Path, experts_here: list[list[int]] | None = None) -> Decoder:
    return load_decoder(folder, CPU, torch.float32, experts_here)


def message(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def logits_of(decoder: Decoder, token_NS: Tensor) -> Tensor:
    rows = rows_of_batch(*token_NS.shape, CPU)
    hidden_TD, _ = decoder(token_NS.flatten(), rows, CausalAttention(len(token_NS)), AllExpertsHere())
    return decoder.logits(hidden_TD).unflatten(0, token_NS.shape)


def assert_as_transformers(model: Any, folder: Path) -> None:
    """The logits of prefill and of every decode step, and so the greedy tokens; then of whole sequences."""
    chosen_by: dict[tuple[int, int], Tensor] = {}

    def observe(rows: Rows, logits_TV: Tensor) -> None:
        places = zip(rows.sequence_T.tolist(), rows.position_T.tolist(), strict=True)
        chosen_by.update(zip(places, logits_TV, strict=True))

    engine = load_model(folder)
    tokens = engine.generate(Request(PROMPTS, NEW), observe).tokens
    for number, (prompt, new) in enumerate(zip(PROMPTS, tokens, strict=True)):
        expected_SV = model(torch.tensor([prompt + new])).logits[0]
        for position in range(len(prompt) - 1, len(prompt) + NEW - 1):
            found_V = chosen_by[number, position]
            torch.testing.assert_close(found_V, expected_SV[position], atol=1e-4, rtol=0)
        assert new == expected_SV[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    token_NS = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(logits_of(engine.decoder, token_NS), model(token_NS).logits, atol=1e-4, rtol=0)


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
    """All other experts are NaN in the file."""
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


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


# what was published: the keys that matter, as transformers 4 wrote them
PUBLISHED: dict[str, tuple[dict[str, Any], float, dict[str, Any]]] = {
    "mixtral": (  # Mixtral-8x7B
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        46.7e9,
        {"windows": (), "gate_softmax": "chosen", "rope": {"theta": 1e6, "yarn": None}},
    ),
    "olmoe": (  # OLMoE-1B-7B
        {
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 50304,
        },
        6.92e9,
        {"qk_norm": "width", "gate_softmax": "all", "head_dim": 128},
    ),
    "qwen3_moe": (  # Qwen3-30B-A3B
        {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        30.5e9,
        {"qk_norm": "head", "gate_softmax": "chosen", "intermediate_size": 768, "windows": ()},
    ),
    "gpt_oss": (  # gpt-oss-20b
        {
            "attention_bias": True,
            "head_dim": 64,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "quantization_config": {"quant_method": "mxfp4"},
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "vocab_size": 201088,
        },
        20.9e9,
        {"windows": (128, None) * 12, "activation": "clamped-swiglu", "attention_sinks": True},
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configurations(family: str, tmp_path: Path) -> None:
    content, parameters, expected = PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | content))
    config = load_model_config(tmp_path)
    found = config.model_dump()
    assert {key: found[key] for key in expected} == expected
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(value.numel() for value in decoder.parameters()) == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act = 'gelu': Input should be 'silu' or 'swish'"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts = None: Input should be a valid integer"),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope_parameters.rope_type = 'llama3': Input should be 'default' or 'yarn'",
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor = 0.5: Input should be greater than or equal to 1",
        ),
        (
            "gpt_oss",
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types[0] = 'chunked_attention': Input should be 'sliding_attention' or 'full_attention'",
        ),
        (
            "qwen3_moe",
            {"quantization_config": {"quant_method": "fp8"}},
            "the weights are quantised (fp8), which is not supported; load the model with transformers, "
            "dequantise it, and save_pretrained() it to another folder",
        ),
        (
            "olmoe",
            {"hidden_size": 36},
            "hidden_size 36 is not a multiple of 8, as grouped matrix products need",
        ),
    ],
)
def test_a_configuration_that_is_not_supported(
    made: Callable[[str], Any], tmp_path: Path, family: str, changes: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(made(family).folder) | changes))
    with pytest.raises(InputError) as error:
        load_model_config(tmp_path)
    assert str(error.value) == f"{path}: {expected}"


def test_a_key_that_is_missing(made: Callable[[str], Any], tmp_path: Path) -> None:
    content = config_of(made("qwen3_moe").folder)
    del content["moe_intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="the key 'moe_intermediate_size' is missing; add it"):
        load_model_config(tmp_path)


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


@pytest.mark.parametrize(
    ("family", "absent", "expected"),
    [
        ("mixtral", "num_key_value_heads", 8),
        ("gpt_oss", "num_key_value_heads", 8),
        ("qwen3_moe", "num_key_value_heads", 4),
        ("olmoe", "num_key_value_heads", 16),
        ("mixtral", None, 16),
        ("qwen3_moe", None, 16),
        ("olmoe", None, 16),
    ],
)
def test_key_and_value_heads_by_default(
    family: str, absent: str | None, expected: int, tmp_path: Path
) -> None:
    """A key that is absent has the family's default; null says as many as there are query heads."""
    content = PUBLISHED[family][0] | {"num_attention_heads": 16, "head_dim": 64, "hidden_size": 1024}
    content = {key: value for key, value in content.items() if key != absent}
    if absent is None:
        content["num_key_value_heads"] = None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | content))
    assert load_model_config(tmp_path).num_kv_heads == expected


def test_the_window_of_qwen3_by_default(tmp_path: Path) -> None:
    content = {key: value for key, value in PUBLISHED["qwen3_moe"][0].items() if key != "sliding_window"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe"} | content | {"use_sliding_window": True})
    )
    assert set(load_model_config(tmp_path).windows) == {4096}
