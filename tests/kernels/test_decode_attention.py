"""Attention of one new token a row against plain torch: windows, sinks, parts of the past, rows not owned."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.kernels.decode_attention import decode_attention
from exflow.model.attention import scaled_dot_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    width=st.sampled_from([8, 12, 16]),
    longest=st.integers(0, 150),
    window=st.sampled_from([None, 1, 5, 70]),
    sinks=st.booleans(),
    splits=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_a_token_sees_its_window_and_the_sinks(
    rows: int,
    heads: tuple[int, int],
    width: int,
    longest: int,
    window: int | None,
    sinks: bool,
    splits: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv = heads
    positions = longest + 1

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    qkv, cache = drawn(rows, num_heads + 2 * num_kv, width), drawn(2, 2, rows, num_kv, positions, width)
    owned = torch.randint(0, 2, (rows,), generator=generator, dtype=torch.int32)
    past = torch.randint(0, positions, (rows,), generator=generator)
    sink = 2 * drawn(num_heads) if sinks else None
    after, out = cache.clone(), torch.full((rows, num_heads, width), 7.0)
    expected = out.clone()
    for row in owned.nonzero()[:, 0].tolist():
        last = int(past[row])
        after[1, :, row, :, last] = qkv[row, num_heads:].view(2, num_kv, width)
        first = 0 if window is None else max(0, last + 1 - window)
        k, v = after[1, :, row, :, first : last + 1]
        seen = torch.ones(1, last + 1 - first, dtype=torch.bool)
        expected[row] = scaled_dot_product(qkv[row, :num_heads, None], k, v, seen, sink)[:, 0]

    here = cache.to(DEVICE)
    run(qkv, owned, past, here, out := out.to(DEVICE), positions, window, sink, splits, num_kv)
    torch.testing.assert_close(out.cpu(), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(here.cpu(), after)


def run(
    qkv: torch.Tensor,
    owned: torch.Tensor,
    past: torch.Tensor,
    cache: torch.Tensor,
    out: torch.Tensor,
    positions: int,
    window: int | None,
    sink: torch.Tensor | None,
    splits: int,
    num_kv: int,
) -> None:
    """Attention of layer 1 of two."""
    rows, heads, width = out.shape
    sums = torch.zeros(rows, heads, splits, width, device=DEVICE)
    peaks = torch.zeros(rows, heads, splits, 2, device=DEVICE)
    attended = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    decode_attention(
        1,
        qkv=qkv.flatten(1).to(DEVICE),
        owned=(owned := owned.to(DEVICE)),
        position=past.to(DEVICE),
        caches=torch.tensor([cache.data_ptr()], device=DEVICE),
        member=0,
        positions=positions,
        window=window,
        sinks=None if sink is None else sink.to(DEVICE),
        out=out,
        sums=sums,
        peaks=peaks,
        attended=attended,
        new_kv=torch.zeros(0, rows, 2 * num_kv * width, device=DEVICE),
        new_kv_owned=torch.zeros(0, rows, dtype=torch.int32, device=DEVICE),
        launch={"PDL": False},
    )
    assert torch.equal(attended, owned)
