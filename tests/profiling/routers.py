"""Tiny Hugging Face models of every family, and an oracle that recomputes the choices of their routers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from exflow.profiling.trace import RoutingTrace

transformers = pytest.importorskip("transformers", reason="needs transformers")
torch.set_num_threads(1)  # for tensors this small more threads only wait for each other


Array = npt.NDArray[Any]
Choice = tuple[Array, Array]  # expert ids [T, k] and weights [T, k], in any order
Rule = Callable[[Array, Any, Any], Choice]  # hidden states [T, d] or [B, S, d], the router, the configuration
PAD, LENGTHS, NEW_TOKENS = 0, (5, 3, 4), 4
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 16,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def softmax(values: Array) -> Array:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(values: Array) -> Array:
    return 1 / (1 + np.exp(-values))


def top(scores: Array, k: int) -> Array:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def pick(values: Array, ids: Array) -> Array:
    return np.take_along_axis(values, ids, axis=-1)


def double(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def logits_of(hidden: Array, router: Any) -> Array:
    logits = hidden.reshape(-1, hidden.shape[-1]) @ double(router.weight).T
    return logits + double(router.bias) if getattr(router, "bias", None) is not None else logits


def softmax_then_top(renormalise: bool) -> Rule:
    """Mixtral, OLMoE, Qwen, Jamba: the k most probable of all experts."""

    def rule(hidden: Array, router: nn.Module, config: Any) -> Choice:
        probability = softmax(logits_of(hidden, router))
        ids = top(probability, config.num_experts_per_tok)
        weights = pick(probability, ids)
        return ids, weights / weights.sum(axis=-1, keepdims=True) if renormalise else weights

    return rule


def top_then_softmax(hidden: Array, router: nn.Module, config: Any) -> Choice:
    """gpt-oss, GraniteMoE: softmax over the logits of the chosen alone."""
    logits = logits_of(hidden, router)
    ids = top(logits, config.num_experts_per_tok)
    return ids, softmax(pick(logits, ids))


def in_best_groups(scores: Array, group_scores: Array, groups: int) -> Array:
    """The scores, -inf outside the `groups` best groups of each token."""
    allowed = np.zeros(group_scores.shape, bool)
    np.put_along_axis(allowed, top(group_scores, groups), True, axis=-1)
    return np.where(np.repeat(allowed, scores.shape[1] // group_scores.shape[1], axis=1), scores, -np.inf)


def deepseek_v2(hidden: Array, router: nn.Module, config: Any) -> Choice:
    """DeepSeek-V2: a group counts as much as its best expert."""
    probability = softmax(logits_of(hidden, router))
    of_group = probability.reshape(len(probability), config.n_group, -1).max(axis=-1)
    ids = top(in_best_groups(probability, of_group, config.topk_group), config.num_experts_per_tok)
    return ids, pick(probability, ids) * config.routed_scaling_factor


def deepseek_v3(hidden: Array, router: Any, config: Any) -> Choice:
    """DeepSeek-V3, GLM-4-MoE: a bias helps to choose, not to weigh; a group counts its best two experts."""
    score = sigmoid(logits_of(hidden, router))
    biased = score + double(router.e_score_correction_bias)
    best_two = np.sort(biased.reshape(len(biased), config.n_group, -1), axis=-1)[..., -2:].sum(axis=-1)
    ids = top(in_best_groups(biased, best_two, config.topk_group), config.num_experts_per_tok)
    weights = pick(score, ids)
    return ids, weights / weights.sum(axis=-1, keepdims=True) * config.routed_scaling_factor


def phimoe(hidden: Array, router: nn.Module, config: Any) -> Choice:
    """Phi-MoE: the best expert, then the best of the rest; each weighed among those not far below it."""
    logits = logits_of(hidden, router)
    ids, weights, left = [], [], logits
    for _ in range(2):
        best = left.max(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):  # padding may have no logits but zeros
            far = (best - logits) / np.maximum(np.abs(logits), best) > 2 * config.router_jitter_noise
        chosen = left.argmax(axis=-1, keepdims=True)
        ids.append(chosen)
        weights.append(pick(softmax(np.where(far, -np.inf, left)), chosen))
        left = left.copy()
        np.put_along_axis(left, chosen, -np.inf, axis=-1)
    return np.concatenate(ids, axis=1), np.concatenate(weights, axis=1)


def llama4(hidden: Array, router: nn.Module, config: Any) -> Choice:
    """Llama 4: a sigmoid of the k highest logits."""
    logits = logits_of(hidden, router)
    ids = top(logits, config.num_experts_per_tok)
    return ids, sigmoid(pick(logits, ids))


@dataclass(frozen=True)
class Case:
    """A family: its configuration class, what makes it tiny, its rule, and where its MoE layers must be."""

    config: str
    rule: Rule
    settings: dict[str, Any]
    moe_layers: tuple[int, ...] = (0, 1, 2, 3)
    num_experts: int = 8
    top_k: int = 2
    in_order: bool = False  # the router's order counts, not the weights'


GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
CASES = {
    "Mixtral": Case(
        "MixtralConfig", softmax_then_top(True), {"num_local_experts": 8, "num_experts_per_tok": 2}
    ),
    "OLMoE": Case("OlmoeConfig", softmax_then_top(False), {"num_experts": 8, "num_experts_per_tok": 2}),
    "Qwen2-MoE": Case(
        "Qwen2MoeConfig",
        softmax_then_top(False),
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
        moe_layers=(0, 2, 3),
    ),
    "Qwen3-MoE": Case(
        "Qwen3MoeConfig",
        softmax_then_top(True),
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "head_dim": 8,
            "decoder_sparse_step": 2,
        },
        moe_layers=(1, 3),
    ),
    "gpt-oss": Case(
        "GptOssConfig",
        top_then_softmax,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4},
    ),
    "DeepSeek-V2": Case(
        "DeepseekV2Config",
        deepseek_v2,
        {
            **GROUPS,
            **LATENT,
            "n_routed_experts": 8,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
        },
        moe_layers=(1, 2, 3),
        top_k=3,
    ),
    "DeepSeek-V3": Case(
        "DeepseekV3Config",
        deepseek_v3,
        {**GROUPS, **LATENT, "n_routed_experts": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 2},
        moe_layers=(2, 3),
        top_k=3,
    ),
    "GLM-4-MoE": Case(
        "Glm4MoeConfig",
        deepseek_v3,
        {**GROUPS, "n_routed_experts": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        moe_layers=(1, 2, 3),
        top_k=3,
    ),
    "Phi-MoE": Case(
        "PhimoeConfig", phimoe, {"num_local_experts": 8, "num_experts_per_tok": 2}, in_order=True
    ),
    "GraniteMoE": Case(
        "GraniteMoeConfig", top_then_softmax, {"num_local_experts": 8, "num_experts_per_tok": 2}
    ),
    "Llama-4": Case(
        "Llama4TextConfig",
        llama4,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 16,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
        },
        moe_layers=(1, 3),
    ),
    "Jamba": Case(
        "JambaConfig",
        softmax_then_top(False),
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        moe_layers=(1, 3),
    ),
}


def tiny_model(name: str, **changes: Any) -> Any:
    """A model of the family with random weights, and routers that are far from undecided."""
    case = CASES[name]
    if not hasattr(transformers, case.config):
        pytest.skip(f"transformers {transformers.__version__} has no {case.config}")
    config = getattr(transformers, case.config)(**{**SMALL, **case.settings, **changes})
    return with_random_weights(lambda: transformers.AutoModelForCausalLM.from_config(config))


def with_random_weights(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for _, router in routers(model):
            for tensor in [*router.parameters(), *router.buffers()]:
                nn.init.normal_(tensor, std=0.5)
    return model.eval()


def routers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if path.endswith((".gate", ".router"))]


@dataclass
class Oracle:
    """Expected choices of every router: ids and weights [T, k] of each pass."""

    ids: list[list[Array]] = field(default_factory=list)
    weights: list[list[Array]] = field(default_factory=list)

    def rows(self, real: list[Array]) -> Choice:
        """Ids and weights [tokens, layers, k] of the rows [T] of each pass that are `real`."""
        both = [
            np.concatenate(
                [
                    np.stack([layer[number] for layer in found], axis=1)[rows]
                    for number, rows in enumerate(real)
                ]
            )
            for found in (self.ids, self.weights)
        ]
        return both[0], both[1]


@contextmanager
def oracle_of(model: nn.Module, rule: Rule, config: Any, in_order: bool = False) -> Iterator[Oracle]:
    oracle, handles = Oracle(), []
    for number, (_, router) in enumerate(routers(model)):
        oracle.ids.append([])
        oracle.weights.append([])

        def heard(router: nn.Module, args: tuple[torch.Tensor], number: int = number) -> None:
            ids, weights = rule(double(args[0]), router, config)
            if not in_order:
                order = np.argsort(-weights, axis=1)
                ids, weights = pick(ids, order), pick(weights, order)
            oracle.ids[number].append(ids)
            oracle.weights[number].append(weights)

        handles.append(router.register_forward_pre_hook(heard))
    yield oracle
    for handle in handles:
        handle.remove()


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [3, 5] of LENGTHS tokens, padded on one side, and their attention mask."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.stack([torch.arange(max(LENGTHS)) < length for length in LENGTHS]).long()
    mask = mask.flip(1) if side == "left" else mask
    return torch.where(mask == 1, torch.randint(3, 64, mask.shape, generator=generator), PAD), mask


def generate(model: Any, **settings: Any) -> Any:
    ids, mask = padded_batch("left")
    ask = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    return model.generate(input_ids=ids, attention_mask=mask, **ask)


def check(trace: RoutingTrace, oracle: Oracle, real: list[Array], tolerance: float = 2e-3) -> None:
    ids, weights = oracle.rows(real)
    np.testing.assert_array_equal(trace.experts, ids)
    assert trace.weights is not None
    np.testing.assert_allclose(trace.weights, weights, rtol=tolerance, atol=1e-4)
