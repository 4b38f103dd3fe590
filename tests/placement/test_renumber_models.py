"""Renumbered checkpoints of tiny random models: transformers computes the same from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exflow.errors import InputError
from exflow.placement.formats.renumber.stream import PLACEMENT, renumber
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from tests.placement.drawn_plans import plan_of_slots

transformers = pytest.importorskip("transformers", reason="transformers builds the models")

EXPERTS, LAYERS = 8, 3
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
GROUPED = {"n_routed_experts": EXPERTS, "topk_group": 2, "n_group": 4, "num_experts_per_tok": 4}
ONE_GROUP = {"n_routed_experts": EXPERTS, "topk_group": 1, "n_group": 1}
LOCAL = {"num_local_experts": EXPERTS}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", LOCAL),
    "qwen2_moe": ("qwen2_moe", {"num_experts": EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": EXPERTS}),
    "olmoe": ("olmoe", {"num_experts": EXPERTS}),
    "gpt_oss": ("gpt_oss", LOCAL | {"sliding_window": 8}),
    "deepseek_v2": ("deepseek_v2", LATENT | ONE_GROUP | {"topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT | ONE_GROUP),
    "deepseek_v3 in groups": ("deepseek_v3", LATENT | GROUPED),
    "llama4_text": (
        "llama4_text",
        LOCAL | {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 1, "attention_chunk_size": 32},
    ),
    "granitemoe": ("granitemoe", LOCAL),
    "phimoe": ("phimoe", LOCAL),
    "glm4_moe": ("glm4_moe", ONE_GROUP | {"n_shared_experts": 1, "first_k_dense_replace": 1}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_layer_start_index": 1}),
    "minimax_m2": ("minimax_m2", LOCAL | {"rotary_dim": 8}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": EXPERTS, "moe_topk": 2}),
    "dots1": ("dots1", ONE_GROUP | {"n_shared_experts": 1, "first_k_dense_replace": 1}),
}
PROMPT = [[1, 5, 17, 42, 9, 77, 3, 60], [1, 80, 2, 33, 71, 12, 54, 8]]


def tiny_model(family: str) -> Any:
    """A model whose weights, router biases and correction biases are random."""
    model_type, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(COMMON | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name:
                value.normal_(std=0.15)
        for name, value in model.named_buffers():
            if "bias" in name:
                value.normal_(std=0.1)
    return model


def moe_layers(family: str) -> tuple[int, ...]:
    settings = FAMILIES[family][1]
    dense = settings.get("first_k_dense_replace", settings.get("moe_layer_start_index", 0))
    return tuple(range(dense, LAYERS))


def random_plan(family: str, groups: int = 1) -> Plan:
    """A plan of random experts; of each routing group among its own places."""
    rng = np.random.default_rng(1)
    layers = moe_layers(family)
    size = EXPERTS // groups
    slots = [
        np.concatenate([group * size + rng.permutation(size) for group in range(groups)]) for _ in layers
    ]
    return plan_of_slots(
        np.array(slots),
        Topology(num_nodes=1, gpus_per_node=4),
        num_hidden_layers=LAYERS,
        moe_layer_ids=layers,
        num_experts=EXPERTS,
    )


def outputs(folder: Path) -> tuple[torch.Tensor, list[list[int]]]:
    """The logits of the prompts, and greedy tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.tensor(PROMPT)
    with torch.no_grad():
        logits = model(tokens).logits
        texts = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
        )
    return logits, texts.tolist()


@pytest.mark.parametrize("stacked", [False, True], ids=["as published", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_renumbered_model_computes_the_same(family: str, stacked: bool, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    tiny_model(family).save_pretrained(old, max_shard_size="60KB", save_original_format=not stacked)
    assert len(list(old.glob("*.safetensors"))) > 1
    plan = random_plan(family, groups=4 if "groups" in family else 1)

    done = renumber(old, plan, new)

    logits, texts = outputs(old)
    new_logits, new_texts = outputs(new)
    assert logits.abs().max() > 0.5
    assert (new_logits - logits).abs().max() < 1e-5
    assert new_texts == texts
    assert done.num_permuted >= plan.num_layers and (done.num_renamed == 0) <= (done.num_permuted > 3)
    placement = json.loads((new / PLACEMENT).read_text())
    assert placement["old_ids"][str(LAYERS - 1)] == plan.physical_to_logical_map[-1].tolist()


def test_the_order_is_not_without_effect(tmp_path: Path) -> None:
    """The comparison above sees a router whose rows did not move: it is not blind."""
    old, new = tmp_path / "old", tmp_path / "new"
    tiny_model("qwen3_moe").save_pretrained(old)
    renumber(old, random_plan("qwen3_moe"), new)
    safetensors = pytest.importorskip("safetensors.torch")
    first, second = (safetensors.load_file(folder / "model.safetensors") for folder in (old, new))
    gate = "model.layers.1.mlp.gate.weight"
    safetensors.save_file(second | {gate: first[gate]}, new / "model.safetensors", metadata={"format": "pt"})
    assert (outputs(new)[0] - outputs(old)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([1, 3, 2, 0, 4, 5, 6, 7], "splits routing group 0"),
        ([2, 3, 0, 1, 4, 5, 6, 7], "puts routing group 1 in the place of group 0"),
    ],
)
def test_routing_groups_stay(row: list[int], fault: str, tmp_path: Path) -> None:
    tiny_model("deepseek_v3 in groups").save_pretrained(tmp_path / "old")
    layers = moe_layers("deepseek_v3 in groups")
    plan = plan_of_slots(
        [row] * 2, Topology(num_nodes=1, gpus_per_node=4), num_hidden_layers=LAYERS, moe_layer_ids=layers
    )
    with pytest.raises(
        InputError, match=rf"config\.json: n_group is 4, and the plan {fault} in layer 1; place"
    ):
        renumber(tmp_path / "old", plan, tmp_path / "new")
    assert not (tmp_path / "new").exists()
