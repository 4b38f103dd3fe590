"""record() on Hugging Face models: every family against its published routing rule, and what passes hold.

The oracle hears what goes into each router and applies the family's rule to it in numpy, in double precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from exflow.errors import InputError
from exflow.profiling.record import record
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace

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


def switch(hidden: Array, router: Any, config: Any) -> Choice:
    """Switch Transformers: the most probable; beyond `expert_capacity` in a sequence a token is turned away.

    The capacity counts where the router sees sequences; up to transformers 5.17 it sees none.
    """
    probability = softmax(hidden @ double(router.classifier.weight).T)
    ids = top(probability, 1)
    weights = pick(probability, ids)
    if hidden.ndim == 3:
        taken = np.eye(config.num_experts)[ids[..., 0]].cumsum(axis=1)  # [B, S, E]
        weights = weights * (pick(taken, ids) <= config.expert_capacity)
    return ids.reshape(-1, 1), weights.reshape(-1, 1)


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
    """What every router should have chosen: for each of them, ids and weights [T, k] of each pass."""

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


EVERY = slice(None)
PROMPT = padded_batch("left")[1].bool().flatten().numpy()
PROMPT_SEQUENCE = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
PROMPT_POSITION = [place for length in LENGTHS for place in range(length)]


@pytest.mark.parametrize("name", CASES)
def test_the_trace_is_what_the_routers_chose(name: str, tmp_path: Path) -> None:
    """Prefill padded on the left, decode steps, then a pass padded on the right, in one recording."""
    case, model = CASES[name], tiny_model(name)
    right_ids, right_mask = padded_batch("right")
    with (
        oracle_of(model, case.rule, model.config, case.in_order) as oracle,
        record(model, tmp_path / "trace", weights=True) as recorder,
        torch.no_grad(),
    ):
        generate(model)
        model(input_ids=right_ids, attention_mask=right_mask)
    trace = recorder.trace
    steps = NEW_TOKENS - 1  # the last new token is not run
    check(trace, oracle, [PROMPT] + [EVERY] * steps + [right_mask.bool().flatten().numpy()])

    assert (trace.moe_layer_ids, trace.num_hidden_layers) == (case.moe_layers, 4)
    assert (trace.num_experts, trace.top_k, trace.model) == (8, case.top_k, type(model).__name__)
    decoded = [length + step for step in range(steps) for length in LENGTHS]
    second = [number + 3 for number in PROMPT_SEQUENCE]
    assert trace.sequence.tolist() == PROMPT_SEQUENCE + [0, 1, 2] * steps + second
    assert trace.position.tolist() == PROMPT_POSITION + decoded + PROMPT_POSITION
    assert trace.phase.tolist() == [PREFILL] * 12 + [DECODE] * 3 * steps + [PREFILL] * 12
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def tiny_switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=16,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=3,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=3,
        num_experts=8,
        expert_capacity=1,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
    )
    return with_random_weights(lambda: transformers.SwitchTransformersForConditionalGeneration(config))


def test_encoder_and_decoder_are_recorded_each_by_itself() -> None:
    model = tiny_switch()
    with (
        oracle_of(model.encoder, switch, model.config) as encoder_oracle,
        oracle_of(model.decoder, switch, model.config) as decoder_oracle,
        record(model.encoder, weights=True) as encoder,
        record(model.decoder, weights=True) as decoder,
    ):
        generate(model)
    check(encoder.trace, encoder_oracle, [PROMPT])
    check(decoder.trace, decoder_oracle, [EVERY] * NEW_TOKENS)
    assert encoder.trace.moe_layer_ids == (1, 3)
    assert decoder.trace.moe_layer_ids == (0, 1, 2)
    assert (encoder.trace.num_experts, encoder.trace.top_k) == (8, 1)
    assert encoder.trace.sequence.tolist() == PROMPT_SEQUENCE
    assert decoder.trace.sequence.tolist() == [0, 1, 2] * NEW_TOKENS
    assert decoder.trace.position.tolist() == [step for step in range(NEW_TOKENS) for _ in range(3)]
    assert decoder.trace.phase.tolist() == [PREFILL] * 3 + [DECODE] * 3 * (NEW_TOKENS - 1)

    message = "has MoE layers in 2 stacks.* give model.encoder or model.decoder, and call the model as ever"
    with pytest.raises(InputError, match=message), record(model):
        pass


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "Jamba"])
def test_a_static_cache_and_its_four_dimensional_mask(name: str) -> None:
    case, model = CASES[name], tiny_model(name)
    with oracle_of(model, case.rule, model.config) as oracle, record(model, weights=True) as recorder:
        generate(model, cache_implementation="static")
    check(recorder.trace, oracle, [PROMPT] + [EVERY] * (NEW_TOKENS - 1))
    assert recorder.trace.sequence.tolist() == PROMPT_SEQUENCE + [0, 1, 2] * (NEW_TOKENS - 1)
    assert recorder.trace.position.tolist()[12:15] == list(LENGTHS)
    assert recorder.trace.phase.tolist() == [PREFILL] * 12 + [DECODE] * 9


def spread(model: Any, split: int, device: str) -> None:
    """As device_map does: the layers from `split` on are on another device, and fetch what they are given."""
    for module in [*model.model.layers[split:], model.model.norm, model.lm_head]:
        module.to(device)
        module.register_forward_pre_hook(fetch_to(device), with_kwargs=True)


def fetch_to(device: str) -> Callable[..., Any]:
    def fetch(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(
            lambda part: part.to(device) if isinstance(part, torch.Tensor) else part, (args, kwargs)
        )

    return fetch


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
            ],
        ),
    ],
)
def test_layers_on_several_devices(device: str) -> None:
    case, model = CASES["Mixtral"], tiny_model("Mixtral")
    spread(model, 2, device)
    with (
        oracle_of(model, case.rule, model.config) as oracle,
        record(model, weights=True) as recorder,
        torch.no_grad(),
    ):
        ids, mask = padded_batch("right")
        model(input_ids=ids, attention_mask=mask)
    check(recorder.trace, oracle, [mask.bool().flatten().numpy()])


def test_a_prompt_in_chunks() -> None:
    model = tiny_model("Mixtral")
    with record(model) as recorder:
        generate(model, prefill_chunk_size=2)
    places = zip(recorder.trace.sequence.tolist(), recorder.trace.position.tolist(), strict=True)
    # numbered by appearance: the shortest prompt, padded on the left, appears last
    assert sorted(places) == [(n, place) for n, length in enumerate((5, 4, 3)) for place in range(length + 3)]


def test_generate_does_not_compile_while_it_is_recorded() -> None:
    case, model = CASES["Mixtral"], tiny_model("Mixtral")
    compiled = transformers.CompileConfig(backend="eager", mode="default")
    compiled._compile_all_devices = True  # else only GPUs compile
    with oracle_of(model, case.rule, model.config) as oracle, record(model, weights=True) as recorder:
        assert model.generation_config.disable_compile
        generate(model, cache_implementation="static", compile_config=compiled)
    assert model.generation_config.disable_compile is None
    check(recorder.trace, oracle, [PROMPT] + [EVERY] * (NEW_TOKENS - 1))


def test_each_beam_is_a_sequence() -> None:
    case, model = CASES["Mixtral"], tiny_model("Mixtral")
    with oracle_of(model, case.rule, model.config) as oracle, record(model, weights=True) as recorder:
        generate(model, num_beams=2)
    steps = len(oracle.ids[0]) - 1
    prompts = np.concatenate([row for row in PROMPT.reshape(3, -1) for _ in range(2)])
    check(recorder.trace, oracle, [prompts] + [EVERY] * steps)
    assert recorder.trace.sequence.tolist()[24:] == [0, 1, 2, 3, 4, 5] * steps
    assert recorder.trace.position.tolist()[24:30] == [5, 5, 3, 3, 4, 4]


def test_a_cache_goes_on_with_its_sequences() -> None:
    """By hand: a prompt, a second prompt in between, then the first goes on in a chunk and in a step."""
    model = tiny_model("OLMoE")
    ids, mask = padded_batch("right")
    name = "cache" if "cache" in model.model.forward.__annotations__ else "past_key_values"
    with record(model) as recorder, torch.no_grad():
        first = model(ids[:1])
        model(input_ids=ids[1:], attention_mask=mask[1:])
        model(input_ids=ids[:1, :2], **{name: first[name]})
        model(input_ids=ids[:1, :1], **{name: first[name]})
    trace = recorder.trace
    assert trace.sequence.tolist() == [0] * 5 + [1] * 3 + [2] * 4 + [0] * 3
    assert trace.position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 5, 6, 7]
    assert trace.phase.tolist() == [PREFILL] * 14 + [DECODE]


def test_every_pass_without_a_cache_begins_anew() -> None:
    model = tiny_model("OLMoE")
    with record(model) as recorder:
        generate(model, use_cache=False, max_new_tokens=2, min_new_tokens=2)
    assert recorder.trace.num_tokens == 12 + 15
    assert recorder.trace.sequence.max() == 5
    assert set(recorder.trace.phase.tolist()) == {PREFILL}


def test_sequences_packed_into_a_row_are_told_by_their_positions() -> None:
    model = tiny_model("OLMoE")
    with record(model) as recorder, torch.no_grad():
        model(input_ids=torch.arange(3, 8)[None], position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    assert recorder.trace.sequence.tolist() == [0, 0, 0, 1, 1]


def test_the_base_model_can_be_recorded_and_gradients_do_not_matter() -> None:
    model = tiny_model("OLMoE").train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True  # runs it twice
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    with record(model.model) as recorder:
        loss = model(input_ids=torch.arange(3, 8)[None], labels=torch.arange(3, 8)[None]).loss
        loss.backward()
    assert recorder.trace.num_tokens == 5


def test_a_model_without_experts_says_what_was_looked_for() -> None:
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 1})
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    message = (
        r"record: LlamaForCausalLM has no MoE layers that are known: looked for modules called with "
        r"\(hidden_states, top_k_index .*Switch Transformers and Llama 4; give a Mixture-of-Experts model"
    )
    with pytest.raises(InputError, match=message), record(model):
        pass


class OtherExperts(nn.Module):
    def forward(self, hidden_states: torch.Tensor, routing_data: Any) -> torch.Tensor:
        return hidden_states


def test_experts_that_cannot_be_listened_to_are_named() -> None:
    model = tiny_model("OLMoE")
    for layer in model.model.layers:
        layer.mlp.experts = OtherExperts()
    message = r"model.layers.0.mlp.experts is a OtherExperts\(hidden_states, routing_data\)"
    with pytest.raises(InputError, match=message), record(model):
        pass


def test_a_block_that_bypasses_its_experts_is_found_out() -> None:
    model = tiny_model("OLMoE")
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    message = "model.layers.1.mlp.experts (ran as|was not called)|model.layers.2.mlp.experts ran as number 1"
    with pytest.raises(InputError, match=message), record(model):
        model(input_ids=torch.arange(3, 8)[None])
    model = tiny_model("OLMoE")
    model.model.layers[3].mlp.forward = lambda hidden: hidden
    message = "model.layers.3.mlp.experts was not called in a pass; load the model without use_kernels"
    with pytest.raises(InputError, match=message), record(model):
        model(input_ids=torch.arange(3, 8)[None])


def test_experts_split_over_ranks_are_refused() -> None:
    model = tiny_model("Mixtral")
    model.model.layers[0].mlp.experts.num_experts = 4
    message = "model.layers.0.mlp.experts has 4 of 8 experts, split over ranks; load the model without expert"
    with pytest.raises(InputError, match=message), record(model):
        pass


class Compiled(nn.Module):
    """As torch.compile has it, which takes seconds to load."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def test_a_compiled_model_is_refused() -> None:
    message = "record: Compiled is compiled, which leaves hooks out; give it as it was before"
    with pytest.raises(InputError, match=message), record(Compiled(tiny_model("Mixtral"))):
        pass


def test_masks_and_caches_that_do_not_tell_are_refused() -> None:
    model = tiny_model("OLMoE")
    ids, mask = padded_batch("right")
    with record(model) as recorder, torch.no_grad():
        with pytest.raises(
            InputError, match=r"of shape \(3, 4\) does not tell which of 5 tokens are padding"
        ):
            model(input_ids=ids, attention_mask=mask[:, :4])
        with pytest.raises(InputError, match="of type object does not tell which of 5 tokens"):
            model(input_ids=ids, attention_mask={"sliding_attention": mask, "full_attention": object()})
        with pytest.raises(InputError, match="a cache of type object does not tell sequences apart"):
            model.model(input_ids=ids, past_key_values=object())
        model(input_ids=ids, attention_mask=mask)
    assert recorder.trace.num_tokens == sum(LENGTHS)
