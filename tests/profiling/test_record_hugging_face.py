"""record() on Hugging Face models: every family against its published routing rule, and what passes hold.

The oracle hears what goes into each router and applies the family's rule to it in numpy, in double precision.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from exflow.errors import InputError
from exflow.profiling.record import record
from exflow.profiling.trace import DECODE, PREFILL
from tests.profiling.routers import (
    CASES,
    LENGTHS,
    NEW_TOKENS,
    PAD,
    Array,
    Choice,
    check,
    double,
    generate,
    oracle_of,
    padded_batch,
    pick,
    softmax,
    tiny_model,
    top,
    with_random_weights,
)

transformers = pytest.importorskip("transformers", reason="needs transformers")
torch.set_num_threads(1)  # for tensors this small more threads only wait for each other


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
    """Move the layers from `split` on to another device, as device_map does; they fetch their inputs."""
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
    """Call the model: a prompt, a second one in between, then the first continues in a chunk and a step."""
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
