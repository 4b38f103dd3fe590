"""Tiny models of many families, and the ways in which a caller can run them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
torch.set_num_threads(1)  # for tensors this small more threads only wait for each other


NEW = 3
COMMON = {  # what a family has of it; they differ in names
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 64,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 4,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_chunk_size": 8,
    "n_groups": 1,
    "ssm_state_size": 4,
    "chunk_size": 8,
    "block_size": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 64,
}


@dataclass(frozen=True)
class Family:
    """Recipe of a tiny model of a `model_type`, and the ways in which transformers itself differs.

    drifts: cached and uncached runs of these ways differ in the model, so that places alone are compared.
    lacks: transformers cannot run these at all.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    drifts: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


def layers(*kinds: str) -> dict[str, Any]:
    """`layer_types`, by the first letter of linear and full attention, of convolution and of a MoE alone."""
    names = {"l": "linear_attention", "f": "full_attention", "c": "conv", "m": "moe"}
    return {"layer_types": [names[kind] for kind in kinds]}


MAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 8,
    "output_gate_type": "sigmoid",
}
FAMILIES = {
    "BailingHybrid": Family("bailing_hybrid", {**layers(*"llfl"), "num_key_value_heads": 4}),
    "GraniteMoeHybrid": Family("granitemoehybrid", layers(*"llfl")),
    "Inkling": Family("inkling_text", drifts=("static",)),
    "Jamba": Family("jamba", MAMBA, drifts=("chat", "chunks")),
    "KimiLinear": Family("kimi_linear", {**layers(*"llfl"), "num_key_value_heads": 4}),
    "LaraMini": Family("lara_mini"),
    "LFM2-MoE": Family("lfm2_moe", layers(*"cfcf")),
    "MiniMax, attention first": Family("minimax", layers(*"flfl")),
    "Nemotron-H": Family("nemotron_h", layers(*"lmfm"), lacks=("embeddings",)),
    "Qwen3-Next": Family("qwen3_next"),
    "Qwen3.5-MoE": Family("qwen3_5_moe_text"),
    "Qwen4-Exp": Family("qwen4_exp_text", QWEN4),
    "Zaya": Family("zaya", {"num_experts_per_tok": 1}),
    "Mixtral": Family("mixtral", {"sliding_window": 4}),
    "gpt-oss": Family("gpt_oss", {"sliding_window": 4}),
    "DeepSeek-V3": Family("deepseek_v3", {"num_key_value_heads": 4}),
    "DeepSeek-V3.2": Family("deepseek_v32", {"num_key_value_heads": 4}),
    "Llama 4": Family("llama4_text"),
}
LINEAR_FIRST = Family("minimax", layers(*"llfl"))
ALL_LINEAR = Family("minimax", layers(*"llll"))


def tiny(family: Family) -> Any:
    """A model with random weights that are far from undecided."""
    if family.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family.model_type}")
    kind = transformers.CONFIG_MAPPING[family.model_type]
    default = kind()
    known = {name: value for name, value in COMMON.items() if hasattr(default, name)}
    return with_random_weights(
        lambda: transformers.AutoModelForCausalLM.from_config(kind(**{**known, **family.settings}))
    )


def with_random_weights(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().float()
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.3)
    return model.eval()


@cache
def model_of(name: str) -> Any:
    return tiny(FAMILIES[name])


PROMPTS = [[11, 42, 7, 33, 58], [25, 3, 61], [19, 8, 47, 30]]


def batch(side: str = "left", prompts: list[list[int]] = PROMPTS) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    gaps = [[0] * (longest - len(prompt)) for prompt in prompts]
    pairs = list(zip(gaps, prompts, strict=True))
    ids = [gap + prompt if side == "left" else prompt + gap for gap, prompt in pairs]
    real = [[1] * len(prompt) for prompt in prompts]
    mask = [gap + ones if side == "left" else ones + gap for gap, ones in zip(gaps, real, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model: Any, given: dict[str, Tensor], **settings: Any) -> Any:
    ask = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(**given, **ask)


def texts(output: Tensor, prompts: list[list[int]] = PROMPTS, unrun: int = 1) -> list[list[int]]:
    """The prompts and what was generated, of which the last is not run."""
    longest = max(map(len, prompts))
    repeats = len(output) // len(prompts)
    each = [prompt for prompt in prompts for _ in range(repeats)]
    return [
        prompt + row[longest : len(row) - unrun] for prompt, row in zip(each, output.tolist(), strict=True)
    ]


def cache_name(model: Any) -> str:
    """Return transformers' name of the argument: `cache` from 5.23 on."""
    names = inspect.signature(type(model.base_model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def by_hand(model: Any, steps: tuple[int, ...], masked: bool, placed: bool) -> list[list[int]]:
    text = torch.tensor([[9, 41, 17, 5, 28, 60, 13], [50, 2, 36, 22, 44, 6, 31]])
    name, past, at = cache_name(model), None, 0
    for step in steps:
        given: dict[str, Any] = {name: past} if past is not None else {}
        if masked:
            given["attention_mask"] = torch.ones(2, at + step, dtype=torch.long)
        if placed:
            given["position_ids"] = torch.arange(at, at + step).expand(2, step)
        with torch.no_grad():
            past = model(input_ids=text[:, at : at + step], use_cache=True, **given)[name]
        at += step
    return text.tolist()


def chat(model: Any) -> list[list[int]]:
    """A second turn, which goes on with the cache of the first."""
    name = cache_name(model)
    first = generate(model, batch(prompts=PROMPTS[:1]), return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    given = {"input_ids": turn, "attention_mask": torch.ones_like(turn), name: first[name]}
    return texts(generate(model, given), turn.tolist())


def two_calls(model: Any) -> list[list[int]]:
    once = generate(model, batch())
    again = generate(model, batch(prompts=PROMPTS[1:2]))
    return texts(once) + texts(again, PROMPTS[1:2])


def right_padded(model: Any) -> list[list[int]]:
    with torch.no_grad():
        model(**batch("right"))
    return PROMPTS


def without_cache(model: Any) -> list[list[int]]:
    output = generate(model, batch(), use_cache=False, max_new_tokens=2, min_new_tokens=2)
    return texts(output, unrun=2) + texts(output)


def from_embeddings(model: Any) -> list[list[int]]:
    given = batch()
    embedded = model.get_input_embeddings()(given["input_ids"])
    new = generate(model, {"inputs_embeds": embedded, "attention_mask": given["attention_mask"]})
    return texts(torch.cat([given["input_ids"], new], dim=1))


WAYS: dict[str, Callable[[Any], list[list[int]]]] = {
    "greedy": lambda model: texts(generate(model, batch())),
    "sampled": lambda model: texts(generate(model, batch(), do_sample=True, num_return_sequences=2)),
    "static": lambda model: texts(generate(model, batch(), cache_implementation="static")),
    "two_calls": two_calls,
    "chat": chat,
    "right_padded": right_padded,
    "without_cache": without_cache,
    "embeddings": from_embeddings,
    "steps": lambda model: by_hand(model, (4, 1, 1, 1), masked=False, placed=False),
    "steps_masked": lambda model: by_hand(model, (4, 1, 1, 1), masked=True, placed=False),
    "steps_placed": lambda model: by_hand(model, (4, 1, 1, 1), masked=True, placed=True),
    "chunks": lambda model: by_hand(model, (3, 2, 2), masked=True, placed=True),
}
"""Each runs a model in one way, and gives the texts that were run, in order."""
