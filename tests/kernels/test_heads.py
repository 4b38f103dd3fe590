"""Queries, keys and values before attention, against what decoder.Attention makes of them."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.kernels.heads import prepare_heads
from exflow.model.config import ModelConfig, Rope
from exflow.model.decoder import Attention, Rows
from exflow.model.rotary import Rotary
from exflow.profiling.trace import DECODE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Seen:
    """An attention context that only looks at what it is given."""

    def attend(self, layer: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows) -> Any:
        self.qkv = torch.cat([q, k, v], dim=1).flatten(1)
        return q


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3)]),
    width=st.sampled_from([2, 6, 16]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    qk_norm=st.sampled_from([None, "head", "width"]),
    clip=st.sampled_from([None, 0.7]),
    rotary=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.inference_mode()
def test_heads_are_those_of_the_decoder(
    heads: tuple[int, int],
    width: int,
    norm: str,
    qk_norm: str | None,
    clip: float | None,
    rotary: bool,
    seed: int,
) -> None:
    num_heads, num_kv = heads
    sizes = {"vocab_size": 300, "max_positions": 64, "num_hidden_layers": 1, "hidden_size": 16}
    sizes |= {"intermediate_size": 8, "num_experts": 2}
    sizes |= {"num_attention_heads": num_heads, "num_kv_heads": num_kv, "head_dim": width}
    rope = Rope(theta=100.0) if rotary else None
    kind = {"norm": norm, "qk_norm": qk_norm, "qkv_clip": clip, "rope": rope}
    config = ModelConfig.model_validate(sizes | kind)
    generator = torch.Generator().manual_seed(seed)
    attention = Attention(config, 0)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(5, 16, generator=generator)
    position = torch.randint(0, 64, (5,), generator=generator)
    seen = Seen()
    attention(hidden, Rows(torch.arange(5), position, DECODE), seen)

    owned = torch.tensor([1, 0, 1, 1, 1], dtype=torch.int32)
    qkv = attention.qkv(attention.norm(hidden))
    expected = torch.where(owned[:, None] != 0, seen.qkv, qkv)
    ours = qkv.to(DEVICE)
    cos_sin = Rotary(Rope(theta=100.0), width).turns(torch.arange(64, device=DEVICE))
    attention.to(DEVICE)
    prepare_heads(
        ours,
        owned=owned.to(DEVICE),
        position=position.to(DEVICE),
        heads=num_heads,
        kv_heads=num_kv,
        width=width,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        norm_over=qk_norm,
        clip=clip,
        cos_sin=cos_sin if rotary else None,
        launch={"PDL": False},
    )
    torch.testing.assert_close(ours.cpu(), expected, atol=2e-5, rtol=1e-5)
