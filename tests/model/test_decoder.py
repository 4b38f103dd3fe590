"""The decoder against a second one written as loops over tokens, and the laws any decoder obeys."""

from collections.abc import Callable
from math import erf, exp, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder, DenseMLP, MoE, initialise
from exflow.model.single_process import AllExpertsHere
from exflow.profiling.trace import PREFILL

Array = npt.NDArray[np.float64]
gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / sqrt(2))), otypes=[float])
silu = np.vectorize(lambda x: x / (1 + exp(-x)), otypes=[float])
each_shape = pytest.mark.parametrize(("top_k", "moe_every"), [(1, 1), (1, 2), (2, 1), (2, 2)])
PUBLISHED = {"num_attention_heads": 6, "num_kv_heads": 3, "head_dim": 24, "activation": "swiglu"}


def run(decoder: Decoder, token_NS: Tensor) -> Tensor:
    """Vocabulary scores [N, S, V] of N sequences of equal length S."""
    rows = rows_of_batch(*token_NS.shape, torch.device("cpu"))
    hidden_TD, _ = decoder(token_NS.flatten(), rows, CausalAttention(len(token_NS)), AllExpertsHere())
    return decoder.logits(hidden_TD).unflatten(0, token_NS.shape)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(7))


def loop_decoder(decoder: Decoder, tokens: list[int]) -> Array:
    """Vocabulary scores [S, V] of one sequence, from the weights alone: float64, token after token."""
    config = decoder.config
    weights = {name: value.double().numpy() for name, value in decoder.state_dict().items()}
    width, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_kv_heads

    def norm(name: str, x: Array) -> Array:
        scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(block: str, stream: list[Array]) -> list[Array]:
        keys: list[Array] = []
        values: list[Array] = []
        out = []
        for x in stream:
            projected = weights[f"{block}.qkv.weight"] @ norm(f"{block}.norm", x)
            query = projected[: heads * width].reshape(heads, width)
            key, value = projected[heads * width :].reshape(2, kv_heads, width)
            keys.append(key)
            values.append(value)
            attended = []
            for head in range(heads):
                shared = head * kv_heads // heads
                scores = np.array([query[head] @ key[shared] / sqrt(width) for key in keys])
                share = np.exp(scores - scores.max())
                share /= share.sum()
                attended.append(sum(p * value[shared] for p, value in zip(share, values, strict=True)))
            out.append(x + weights[f"{block}.out.weight"] @ np.concatenate(attended))
        return out

    def activated(inner: Array) -> Array:
        if config.activation == "gelu":
            return np.asarray(gelu(inner))
        gate, up = inner.reshape(2, config.intermediate_size)
        return np.asarray(silu(gate) * up)

    def moe(block: str, x: Array) -> Array:
        normed = norm(f"{block}.norm", x)
        scores = weights[f"{block}.router.gate.weight"] @ normed
        gate = np.exp(scores) / sum(exp(score) for score in scores)
        chosen = sorted(range(config.num_experts), key=lambda e: -gate[e])[: config.top_k]
        total = 1.0 if config.top_k == 1 else sum(gate[e] for e in chosen)
        w_in, w_out = weights[f"{block}.experts.w_in"], weights[f"{block}.experts.w_out"]
        return x + sum(gate[e] / total * (w_out[e] @ activated(w_in[e] @ normed)) for e in chosen)

    def dense(block: str, x: Array) -> Array:
        inner = activated(weights[f"{block}.w_in.weight"] @ norm(f"{block}.norm", x))
        return x + weights[f"{block}.w_out.weight"] @ inner

    stream = [weights["embedding.weight"][t] + weights["positions.weight"][p] for p, t in enumerate(tokens)]
    for layer in range(config.num_hidden_layers):
        mlp = moe if layer in config.moe_layer_ids else dense
        stream = attention(f"blocks.{layer}.attention", stream)
        stream = [mlp(f"blocks.{layer}.mlp", x) for x in stream]
    return np.array([weights["embedding.weight"] @ norm("norm", x) for x in stream])


@each_shape
@pytest.mark.parametrize("changes", [{}, PUBLISHED], ids=["gelu", "swiglu-wide-heads"])
def test_equals_the_decoder_written_as_loops(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    top_k: int,
    moe_every: int,
    changes: dict[str, Any],
) -> None:
    decoder = tiny_decoder(tiny_config(top_k, moe_every, **changes))
    with torch.no_grad():
        for name, value in decoder.named_parameters():  # biases and scales of the norms that matter
            if "norm" in name:
                value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
    token_NS = random_tokens(2, 9)
    expected = [loop_decoder(decoder, tokens) for tokens in token_NS.tolist()]
    np.testing.assert_allclose(run(decoder, token_NS).numpy(), expected, rtol=1e-3, atol=1e-3)


@each_shape
def test_a_later_token_leaves_earlier_ones_unchanged(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    top_k: int,
    moe_every: int,
) -> None:
    decoder = tiny_decoder(tiny_config(top_k, moe_every))
    token_NS = random_tokens(1, 12)
    before = run(decoder, token_NS)
    token_NS[0, 8] += 1 if token_NS[0, 8] < 256 else -1
    after = run(decoder, token_NS)
    torch.testing.assert_close(after[:, :8], before[:, :8])
    assert (after[:, 8:] - before[:, 8:]).abs().amax(dim=(0, 2)).min() > 1e-3  # and it matters to all others


@each_shape
def test_a_sequence_does_not_depend_on_its_neighbours(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    top_k: int,
    moe_every: int,
) -> None:
    decoder = tiny_decoder(tiny_config(top_k, moe_every))
    token_NS = random_tokens(5, 10)
    together = run(decoder, token_NS)
    for number in range(5):
        torch.testing.assert_close(together[number], run(decoder, token_NS[number : number + 1])[0])


def test_every_parameter_of_a_model_with_all_parts_is_trained(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    parts = {"norm": "rmsnorm", "rope": {"theta": 1e4}, "qk_norm": "head", "windows": [3, None, 3, None]}
    biases = {"attention_bias": True, "attention_sinks": True, "gate_bias": True, "expert_bias": True}
    mlps = {"activation": "clamped-swiglu", "moe_every": 2, "dense_intermediate_size": 24, "tied_head": False}
    decoder = Decoder(tiny_config(top_k=2, **parts, **biases, **mlps))
    initialise(decoder, torch.Generator().manual_seed(0))
    assert decoder.blocks[0].mlp.w_out.weight.shape == (32, 24)
    for block in decoder.blocks:
        assert not block.attention.sinks.any() and not block.attention.qkv.bias.any()
        assert block.attention.q_norm.weight.tolist() == [1.0] * 8
    run(decoder, random_tokens(8, 30)).log_softmax(dim=-1)[..., 0].mean().backward()
    for name, value in decoder.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), name


def test_the_order_of_words_matters(tiny_decoder: Callable[..., Decoder]) -> None:
    scores = run(tiny_decoder(), torch.tensor([[1, 2, 3], [2, 1, 3]]))
    assert (scores[0, 2] - scores[1, 2]).abs().max() > 1e-3


def test_shared_key_value_heads_equal_plain_attention_with_the_heads_repeated(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder]
) -> None:
    shared = tiny_decoder(tiny_config(num_kv_heads=2))
    plain = tiny_decoder(tiny_config(num_kv_heads=4))
    state = shared.state_dict()
    for layer in range(4):
        name = f"blocks.{layer}.attention.qkv.weight"
        query, key, value = state[name].split([32, 16, 16])
        repeated = [x.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (key, value)]
        state[name] = torch.cat([query, *repeated])
    plain.load_state_dict(state)
    token_NS = random_tokens(2, 10)
    torch.testing.assert_close(run(plain, token_NS), run(shared, token_NS))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gate_weights(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder], top_k: int
) -> None:
    layer = tiny_decoder(tiny_config(top_k)).blocks[0].mlp
    hidden_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    routing = layer.router(hidden_TD)
    probability_TE = (hidden_TD @ layer.router.gate.weight.T).softmax(dim=-1)
    torch.testing.assert_close(routing.probability_TE, probability_TE)
    best_first = probability_TE.argsort(dim=-1, descending=True)[:, :top_k]
    assert routing.expert_TK.tolist() == best_first.tolist()
    chosen_TK = probability_TE.gather(1, best_first)
    if top_k == 1:
        torch.testing.assert_close(routing.weight_TK, chosen_TK)
    else:
        torch.testing.assert_close(routing.weight_TK.sum(dim=1), torch.ones(50))
        ratio = chosen_TK[:, 0] / chosen_TK[:, 1]
        torch.testing.assert_close(routing.weight_TK[:, 0] / routing.weight_TK[:, 1], ratio)


def test_the_gate_computes_in_float32_whatever_the_model_does(
    tiny_decoder: Callable[..., Decoder],
) -> None:
    routing = tiny_decoder().blocks[0].mlp.router.bfloat16()(torch.ones(1, 32, dtype=torch.bfloat16))
    assert routing.weight_TK.dtype == torch.float32


@pytest.mark.parametrize("moe_every", [1, 2, 3])
def test_dense_layers_stand_between_the_moe_layers(
    tiny_config: Callable[..., ModelConfig], moe_every: int
) -> None:
    config = tiny_config(moe_every=moe_every)
    mlps = [block.mlp for block in Decoder(config).blocks]
    assert tuple(i for i, mlp in enumerate(mlps) if isinstance(mlp, MoE)) == config.moe_layer_ids
    assert all(isinstance(mlp, MoE | DenseMLP) for mlp in mlps)
    moe_layers = [mlp for mlp in mlps if isinstance(mlp, MoE)]
    assert [layer.index for layer in moe_layers] == list(range(len(config.moe_layer_ids)))


def test_number_of_parameters(tiny_config: Callable[..., ModelConfig]) -> None:
    embeddings = 257 * 32 + 64 * 32
    attention = 2 * 32 + (32 + 16 + 16) * 32 + 32 * 32
    moe = 2 * 32 + 8 * 32 + 8 * (16 * 32 + 32 * 16)
    dense = 2 * 32 + 16 * 32 + 32 * 16
    layers = 4 * attention + 2 * moe + 2 * dense
    decoder = Decoder(tiny_config(moe_every=2))
    assert sum(value.numel() for value in decoder.parameters()) == embeddings + layers + 2 * 32


def test_number_of_parameters_of_a_published_shape(tiny_config: Callable[..., ModelConfig]) -> None:
    embeddings = 257 * 32 + 64 * 32
    attention = 2 * 32 + 6 * 24 * 32 + 2 * 3 * 24 * 32 + 32 * 6 * 24
    moe = 2 * 32 + 8 * 32 + 8 * 3 * 16 * 32
    dense = 2 * 32 + 3 * 16 * 32
    decoder = Decoder(tiny_config(moe_every=2, **PUBLISHED))
    expected = embeddings + 4 * attention + 2 * moe + 2 * dense + 2 * 32
    assert sum(value.numel() for value in decoder.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "layers", "heads", "expert", "others"),
    [
        ("gpt-oss-20b", 24, 64 * 64, 3 * 2880 * 2880, 201088 * 2880),
        ("mixtral-8x7b", 32, 32 * 128, 3 * 4096 * 14336, 32000 * 4096),
    ],
)
def test_the_published_shapes(name: str, layers: int, heads: int, expert: int, others: int) -> None:
    config = load_model_config(Path(__file__).parents[2] / "configs" / "shapes" / name)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert config.name == name
    assert decoder.blocks[0].attention.out.weight.shape == (config.hidden_size, heads)
    assert sum(value[0].numel() for value in decoder.blocks[0].mlp.experts.parameters()) == expert
    attention = config.hidden_size * (2 * heads + config.kv_width)
    total = layers * (attention + config.num_experts * expert) + others
    assert sum(value.numel() for value in decoder.parameters()) == pytest.approx(total, rel=1e-3)


def test_a_rank_holds_its_slots_alone(tiny_config: Callable[..., ModelConfig]) -> None:
    for block in Decoder(tiny_config(), num_slots=2).blocks:
        assert block.mlp.experts.w_in.shape == (2, 16, 32)
        assert block.mlp.experts.w_out.shape == (2, 32, 16)
        assert block.mlp.router.gate.weight.shape == (8, 32)


def test_listeners_hear_every_decision_until_they_are_removed(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder]
) -> None:
    decoder = tiny_decoder(tiny_config(top_k=2, moe_every=2))
    heard: list[tuple[Any, ...]] = []
    remove = decoder.add_routing_listener(lambda *decision: heard.append(decision))
    run(decoder, random_tokens(2, 3))
    assert [layer for layer, *_ in heard] == [0, 1]
    for _, expert_TK, weight_TK, sequence_T, position_T, phase in heard:
        assert expert_TK.shape == weight_TK.shape == (6, 2)
        assert sequence_T.tolist() == [0, 0, 0, 1, 1, 1]
        assert position_T.tolist() == [0, 1, 2, 0, 1, 2]
        assert phase == PREFILL
    remove()
    run(decoder, random_tokens(2, 3))
    assert len(heard) == 2


def test_routing_layout(tiny_config: Callable[..., ModelConfig]) -> None:
    layout = Decoder(tiny_config(top_k=2, moe_every=2)).routing_layout()
    assert (layout.model, layout.num_hidden_layers, layout.moe_layer_ids) == ("tiny", 4, (1, 3))
    assert (layout.num_experts, layout.top_k) == (8, 2)


def test_scores_are_float32_in_bf16(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder()
    exact = run(decoder, random_tokens(1, 6))
    scores = run(decoder.bfloat16(), random_tokens(1, 6))
    assert scores.dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1] > 0.99


def test_initial_weights(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(moe_every=2)
    decoder, again = Decoder(config), Decoder(config)
    initialise(decoder, torch.Generator().manual_seed(0))
    initialise(again, torch.Generator().manual_seed(0))
    residual = 0.02 / sqrt(2 * config.num_hidden_layers)
    for name, value in decoder.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
        if "norm" in name:
            assert value.unique().tolist() == ([1.0] if name.endswith("weight") else [0.0])
        else:
            expected = residual if ("attention.out" in name or "w_out" in name) else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.15), name
            assert abs(value.mean().item()) < expected / 5
