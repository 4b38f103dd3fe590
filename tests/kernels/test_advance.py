"""The end of a step against plain indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.kernels.advance import NONFINITE_TOKEN, advance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    ends=st.lists(st.integers(0, 9), max_size=3),
    done=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_the_owned_are_noted(
    dtype: torch.dtype, rows: int, ends: list[int], done: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    best, position = torch.randint(0, 10, (2, rows), generator=generator)
    kind = torch.randint(0, 8, (rows,), generator=generator)
    score = torch.tensor([0.0, -9.0, 1e30, torch.nan, torch.inf, -torch.inf, 5.0, -0.0], dtype=dtype)[kind]
    owned = torch.randint(0, 2, (rows,), generator=generator, dtype=torch.int32)
    state = [torch.full((4, rows), -1), torch.zeros(rows, dtype=torch.int64), position.clone(), owned.clone()]
    state += [torch.tensor([done]), torch.tensor([41])]
    chosen, token, at, left, line, step = (each.to(DEVICE) for each in state)
    advance(
        best=best.to(DEVICE),
        score=score.to(DEVICE),
        ends=torch.tensor([*ends, -1], device=DEVICE),
        chosen=chosen,
        token=token,
        position=at,
        owned=left,
        done=line,
        step=step,
        launch={"PDL": False},
    )
    expected = torch.full((4, rows), -1)
    expected[done] = best.where(score.isfinite(), NONFINITE_TOKEN).where(owned != 0, -1)
    assert torch.equal(chosen.cpu(), expected)
    assert torch.equal(token.cpu(), best)
    assert torch.equal(at.cpu(), position + 1)
    assert torch.equal(left.cpu(), owned * ~torch.isin(best, torch.tensor(ends)))
    assert (line.item(), step.item()) == (done + 1, 42)
