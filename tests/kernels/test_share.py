"""Keys and values from a collective, into the cache: against plain indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.kernels.share import scatter_new_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.sampled_from([4, 12])),
    members=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_others_made_is_written_and_nothing_else(
    dtype: torch.dtype, shape: tuple[int, int, int, int], members: int, seed: int
) -> None:
    layers, rows, heads, width = shape
    positions = 6
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(layers, 2, rows, heads, positions, width, generator=generator).to(DEVICE, dtype)
    everyone = torch.randn(members, layers, rows, 2 * heads * width, generator=generator).to(DEVICE, dtype)
    owner = torch.randint(-1, members, (layers, rows), generator=generator)  # -1: nobody
    owners = (owner == torch.arange(members)[:, None, None]).int().to(DEVICE)
    position = torch.randint(positions, (rows,), generator=generator)
    member = seed % members
    expected = cache.clone()
    for layer in range(layers):
        for row in range(rows):
            who = int(owner[layer, row])
            if who not in (-1, member):
                expected[layer, :, row, :, position[row]] = everyone[who, layer, row].view(2, heads, width)
    scatter_new_kv(
        everyone=everyone,
        owners=owners,
        position=position.to(DEVICE),
        cache=torch.tensor([cache.data_ptr()], device=DEVICE),
        positions=positions,
        member=member,
        width=width,
        launch={"PDL": False},
    )
    assert torch.equal(cache, expected)
