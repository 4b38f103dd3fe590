"""Roles of the tensors that published checkpoints name."""

import pytest

from exflow.errors import InputError
from exflow.placement.formats.renumber.tensors import Kind, Role, renamed, role_of

OWN, STACKED, ROUTER, SHARED = Kind.OWN, Kind.STACKED, Kind.ROUTER, Kind.SHARED
DRAFT, OTHER = Kind.DRAFT, Kind.OTHER


def own(block: str, parts: str, suffixes: str = "weight") -> dict[str, Kind]:
    """The tensors of expert 7 in layer 3."""
    names = [
        f"model.layers.3.{block}.experts.7.{part}.{suffix}"
        for part in parts.split()
        for suffix in suffixes.split()
    ]
    return dict.fromkeys(names, OWN)


GATED = "gate_proj up_proj down_proj"
MLP_GATE = {"model.layers.3.mlp.gate.weight": ROUTER}
CORRECTED = {"model.layers.3.mlp.gate.e_score_correction_bias": ROUTER}
SHARED_EXPERTS = {f"model.layers.3.mlp.shared_experts.{part}.weight": SHARED for part in GATED.split()}
DENSE = {f"model.layers.0.mlp.{part}.weight": OTHER for part in GATED.split()}
COMMON = {
    "model.embed_tokens.weight": OTHER,
    "model.layers.3.input_layernorm.weight": OTHER,
    "model.layers.3.post_attention_layernorm.weight": OTHER,
    "model.layers.3.self_attn.q_proj.weight": OTHER,
    "model.layers.3.self_attn.q_norm.weight": OTHER,
    "model.norm.weight": OTHER,
    "lm_head.weight": OTHER,
}
DEEPSEEK_DRAFT = {
    "model.layers.61.eh_proj.weight": DRAFT,
    "model.layers.61.mlp.experts.7.up_proj.weight": DRAFT,
    "model.layers.61.mlp.gate.weight": DRAFT,
    "model.layers.61.mlp.shared_experts.up_proj.weight": DRAFT,
    "model.layers.61.shared_head.head.weight": DRAFT,
}
FAMILIES = {
    "Mixtral": own("block_sparse_moe", "w1 w2 w3") | {"model.layers.3.block_sparse_moe.gate.weight": ROUTER},
    "Mixtral GPTQ": own("block_sparse_moe", "w1", "qweight qzeros scales g_idx"),
    "Qwen2-MoE": own("mlp", GATED)
    | MLP_GATE
    | {
        "model.layers.3.mlp.shared_expert.gate_proj.weight": SHARED,
        "model.layers.3.mlp.shared_expert_gate.weight": SHARED,
    },
    "Qwen3-MoE": own("mlp", GATED) | MLP_GATE,
    "Qwen3-MoE FP8": own("mlp", GATED, "weight weight_scale_inv"),
    "Qwen3-Next": own("mlp", GATED)
    | MLP_GATE
    | {
        "model.layers.3.linear_attn.in_proj_qkvz.weight": OTHER,
        "model.layers.3.mlp.shared_expert_gate.weight": SHARED,
        "mtp.fc.weight": DRAFT,
        "mtp.layers.0.mlp.experts.7.up_proj.weight": DRAFT,
        "mtp.layers.0.mlp.gate.weight": DRAFT,
    },
    "Qwen3.5-MoE, stacked": {
        "model.language_model.layers.3.mlp.experts.gate_up_proj": STACKED,
        "model.language_model.layers.3.mlp.experts.down_proj": STACKED,
        "model.language_model.layers.3.mlp.gate.weight": ROUTER,
        "model.visual.blocks.3.mlp.linear_fc1.weight": OTHER,
        "mtp.layers.0.mlp.experts.down_proj": DRAFT,
    },
    "OLMoE": own("mlp", GATED) | MLP_GATE,
    "gpt-oss": {
        f"model.layers.3.mlp.experts.{matrix}_{part}": STACKED
        for matrix in ("gate_up_proj", "down_proj")
        for part in ("blocks", "scales", "bias")
    }
    | {
        "model.layers.3.mlp.experts.gate_up_proj": STACKED,
        "model.layers.3.mlp.router.weight": ROUTER,
        "model.layers.3.mlp.router.bias": ROUTER,
        "model.layers.3.self_attn.sinks": OTHER,
    },
    "DeepSeek-V2": own("mlp", GATED) | MLP_GATE | SHARED_EXPERTS | DENSE,
    "DeepSeek-V3 and R1": own("mlp", GATED, "weight weight_scale_inv")
    | MLP_GATE
    | CORRECTED
    | SHARED_EXPERTS
    | DENSE
    | DEEPSEEK_DRAFT,
    "DeepSeek AWQ": own("mlp", GATED, "qweight qzeros scales"),
    "Kimi-K2": own("mlp", GATED, "weight_packed weight_scale weight_shape") | MLP_GATE | CORRECTED | DENSE,
    "Kimi-K2.5": {
        "language_model.model.layers.3.mlp.experts.7.up_proj.weight_packed": OWN,
        "language_model.model.layers.3.mlp.gate.e_score_correction_bias": ROUTER,
        "vision_tower.encoder.blocks.3.mlp.fc0.weight": OTHER,
        "mm_projector.proj.0.weight": OTHER,
    },
    "GLM-4.5 and 4.7": own("mlp", GATED)
    | MLP_GATE
    | CORRECTED
    | SHARED_EXPERTS
    | {"model.layers.61.enorm.weight": DRAFT, "model.layers.61.mlp.gate.e_score_correction_bias": DRAFT},
    "Llama-4": {
        "language_model.model.layers.3.feed_forward.experts.gate_up_proj": STACKED,
        "language_model.model.layers.3.feed_forward.experts.down_proj": STACKED,
        "language_model.model.layers.3.feed_forward.router.weight": ROUTER,
        "language_model.model.layers.3.feed_forward.shared_expert.up_proj.weight": SHARED,
        "language_model.model.layers.0.feed_forward.gate_proj.weight": OTHER,
        "vision_model.model.layers.3.mlp.fc1.weight": OTHER,
        "multi_modal_projector.linear_1.weight": OTHER,
    },
    "Granite-MoE": {
        "model.layers.3.block_sparse_moe.input_linear.weight": STACKED,
        "model.layers.3.block_sparse_moe.output_linear.weight": STACKED,
        "model.layers.3.block_sparse_moe.router.layer.weight": ROUTER,
        "model.layers.3.shared_mlp.input_linear.weight": SHARED,
    },
    "Phi-3.5-MoE": own("block_sparse_moe", "w1 w2 w3")
    | {"model.layers.3.block_sparse_moe.gate.weight": ROUTER, "model.layers.3.self_attn.q_proj.bias": OTHER},
    "Ernie-4.5": own("mlp", GATED)
    | MLP_GATE
    | SHARED_EXPERTS
    | {
        "model.layers.3.mlp.moe_statics.e_score_correction_bias": ROUTER,
        "model.mtp_block.0.mlp.gate_proj.weight": DRAFT,
        "model.mtp_linear_proj.0.weight": DRAFT,
    },
    "MiniMax-M2": own("block_sparse_moe", "w1 w2 w3", "weight weight_scale_inv")
    | {
        "model.layers.3.block_sparse_moe.gate.weight": ROUTER,
        "model.layers.3.block_sparse_moe.e_score_correction_bias": ROUTER,
    },
    "Hunyuan": own("mlp", GATED)
    | {
        "model.layers.3.mlp.gate.wg.weight": ROUTER,
        "model.layers.3.mlp.shared_mlp.up_proj.weight": SHARED,
    },
    "dots1": own("mlp", GATED) | MLP_GATE | CORRECTED | SHARED_EXPERTS,
    "Bailing": own("mlp", GATED) | MLP_GATE | {"model.layers.3.mlp.gate.expert_bias": ROUTER},
    "LFM2-MoE": own("feed_forward", "w1 w2 w3")
    | {"model.layers.3.feed_forward.gate.weight": ROUTER, "model.layers.3.feed_forward.expert_bias": ROUTER},
    "Nemotron-H": {
        "backbone.layers.3.mixer.experts.7.up_proj.weight": OWN,
        "backbone.layers.3.mixer.gate.weight": ROUTER,
        "backbone.layers.3.mixer.gate.e_score_correction_bias": ROUTER,
        "backbone.layers.3.mixer.shared_experts.up_proj.weight": SHARED,
        "backbone.layers.4.mixer.in_proj.weight": OTHER,
    },
    "Step-3": {
        "model.layers.3.moe.gate.weight": ROUTER,
        "model.layers.3.moe.router_bias": ROUTER,
        "model.layers.3.moe.gate_proj.weight": STACKED,
        "model.layers.3.share_expert.up_proj.weight": SHARED,
    },
    "bitsandbytes": own(
        "mlp", GATED, "weight weight.absmax weight.quant_map weight.quant_state.bitsandbytes__nf4"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_name_has_its_role(family: str) -> None:
    expected = COMMON | FAMILIES[family]
    found = {name: role_of(name, 61) for name in expected}
    assert {name: role.kind for name, role in found.items()} == expected
    for name, role in found.items():
        if role.kind == OWN:
            assert (role.layer, role.expert) == (3, 7)
            assert renamed(name, role, 12) == name.replace(".experts.7.", ".experts.12.")


@pytest.mark.parametrize(
    "name",
    [
        "transformer.blocks.3.ffn.experts.mlp.w1",  # DBRX: experts are rows of one matrix
        "model.layers.3.mlp.experts.expert_7.wi.weight",  # switch transformers
        "model.layers.3.ffn.gate.tid2eid",  # expert of each token, by its id
        "model.layers.3.mlp.gate.qweight",  # a packed router
        "model.layers.3.mlp.gate.weight_scale_inv",
        "model.layers.3.mlp.experts.gate_up_proj.absmax",
        "model.layers.3.router.per_expert_scale",
        "model.layers.3.block_sparse_moe.input_quantizer.amax",
        "model.layers.3.mlp.router.classifier.weight",
        "model.experts.up_proj",
    ],
)
def test_a_name_that_speaks_of_experts_in_no_known_way_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=r"speaks of experts in no known way.*; save the model") as caught:
        role_of(name, 61)
    assert f"'{name}'" in str(caught.value)


def test_the_stack_of_a_layer_is_known() -> None:
    assert role_of("thinker.model.layers.3.mlp.gate.weight", 61) == Role(ROUTER, "thinker.model.", 3)
