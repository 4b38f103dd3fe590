"""Random weights: the same model on any ranks, wherever its experts live."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.model.random_weights import RandomWeights, random_decoder
from exflow.runtime.deploy import load_model
from exflow.runtime.request import Request

CPU = torch.device("cpu")


def random(
    config: ModelConfig,
    seed: int = 0,
    here: list[list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    return random_decoder(RandomWeights(config, seed), CPU, dtype, here)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), slots=st.integers(1, 5), seed=st.integers(0, 2**64))
def test_an_expert_is_the_same_in_any_slot(
    tiny_config: Callable[..., ModelConfig], data: st.DataObject, slots: int, seed: int
) -> None:
    """Replicas and all, and every other tensor is that of the whole model."""
    config = tiny_config(moe_every=2, activation="swiglu", hidden_size=8)
    row = st.lists(st.integers(0, 7), min_size=slots, max_size=slots)
    here = [data.draw(row), data.draw(row)]
    whole, part = random(config, seed).state_dict(), random(config, seed, here).state_dict()
    experts_of = dict(zip(config.moe_layer_ids, here, strict=True))
    for name, value in part.items():
        expected = whole[name][experts_of[int(name.split(".")[1])]] if ".experts." in name else whole[name]
        assert torch.equal(value, expected), name


def test_biases_and_sinks_are_drawn_or_zero(tiny_config: Callable[..., ModelConfig]) -> None:
    parts = {"norm": "rmsnorm", "rope": {"theta": 1e4}, "attention_sinks": True, "attention_bias": True}
    decoder = random(tiny_config(expert_bias=True, gate_bias=True, **parts), here=[[3, 1]] * 4)
    block = decoder.blocks[1]
    assert block.mlp.experts.b_in.std() > 0 and block.mlp.experts.b_out.std() > 0
    for zero in (block.attention.sinks, block.attention.out.bias, block.mlp.router.gate.bias):
        assert not zero.any()
    assert decoder.norm.weight.tolist() == [1.0] * 32


def test_no_two_tensors_nor_experts_nor_seeds_are_alike(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(moe_every=2)
    seen: set[float] = set()
    count = 0
    for seed in (0, 1):
        for name, value in random(config, seed).named_parameters():
            if "norm" not in name:
                firsts = value[:, 0, 0] if ".experts." in name else value[:1, 0]
                seen.update(firsts.tolist())
                count += len(firsts)
    assert len(seen) == count


def test_the_weights_are_those_of_an_untrained_model(tiny_config: Callable[..., ModelConfig]) -> None:
    decoder = random(tiny_config(moe_every=2))
    residual = 0.02 / 8**0.5
    for name, value in decoder.named_parameters():
        assert not value.requires_grad
        if "norm" in name:
            assert value.unique().tolist() == ([1.0] if name.endswith("weight") else [0.0])
        else:
            expected = residual if ("attention.out" in name or "w_out" in name) else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.15), name
    assert not decoder.training


def test_the_weights_have_the_type_asked_for(tiny_config: Callable[..., ModelConfig]) -> None:
    decoder = random(tiny_config(), dtype=torch.bfloat16)
    assert {value.dtype for value in decoder.parameters()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in decoder.parameters())


def test_a_shape_alone_generates(tiny_config: Callable[..., ModelConfig]) -> None:
    weights = RandomWeights(tiny_config(top_k=2, head_dim=24, activation="swiglu"), seed=3)
    tokens = load_model(weights).generate(Request([[1, 2, 3], [4]], 5)).tokens
    assert [len(each) for each in tokens] == [5, 5]
    assert tokens == load_model(weights).generate(Request([[1, 2, 3], [4]], 5)).tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_draws_the_same_for_any_placement(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config()
    cuda = torch.device("cuda")
    whole, part = (
        random_decoder(RandomWeights(config), cuda, torch.bfloat16, here)
        for here in (None, [[7, 2], [1, 0], [5, 5], [3, 6]])
    )
    for layer, here in enumerate([[7, 2], [1, 0], [5, 5], [3, 6]]):
        mine, all_of_them = part.blocks[layer].mlp.experts.w_in, whole.blocks[layer].mlp.experts.w_in
        assert mine.device.type == "cuda" and torch.equal(mine, all_of_them[here])
    assert torch.equal(part.embedding.weight, whole.embedding.weight)
