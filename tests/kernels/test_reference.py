"""The reference kernels against their definitions, word by word."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exflow.kernels.reference import SlotRows, combine, dispatch, experts, swiglu


@st.composite
def slot_tables(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Slots [T, K] with -1 for elsewhere, weights [T, K], and the number of slots."""
    num_tokens, top_k, num_slots = draw(st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    slots_TK = torch.randint(-1, num_slots, (num_tokens, top_k), generator=generator)
    return slots_TK, torch.rand(num_tokens, top_k, generator=generator), num_slots


def test_the_example_of_the_docstring() -> None:
    slots_TK = torch.tensor([[1, -1], [0, 1], [-1, -1]])
    weights_TK = torch.tensor([[0.25, 0.75], [0.5, 0.125], [0.0, 0.0]])
    rows = dispatch(slots_TK, weights_TK, num_slots=2)
    assert rows.token_R.tolist() == [1, 0, 1]
    assert rows.weight_R.tolist() == [0.5, 0.25, 0.125]
    assert rows.counts_S.tolist() == [1, 2]


@settings(deadline=None)
@given(slot_tables())
def test_dispatch_lists_every_pair_that_lives_here_slot_by_slot(table: tuple[Tensor, Tensor, int]) -> None:
    slots_TK, weights_TK, num_slots = table
    rows = dispatch(slots_TK, weights_TK, num_slots)
    pairs = [
        (slot, token, weights_TK[token, choice].item())
        for slot in range(num_slots)
        for token in range(slots_TK.shape[0])
        for choice in range(slots_TK.shape[1])
        if slots_TK[token, choice] == slot
    ]
    assert rows.token_R.tolist() == [token for _, token, _ in pairs]
    assert rows.weight_R.tolist() == [weight for _, _, weight in pairs]
    assert rows.counts_S.tolist() == [sum(slot == s for slot, _, _ in pairs) for s in range(num_slots)]


def test_experts_take_consecutive_rows_and_may_have_none() -> None:
    rows_RD = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    scale_SFD = torch.eye(2) * torch.tensor([10.0, 100.0, 1000.0])[:, None, None]
    identity_SDF = torch.eye(2).expand(3, 2, 2)
    out_RD = experts(rows_RD, torch.tensor([2, 0, 1]), scale_SFD, identity_SDF, torch.neg)
    assert out_RD.tolist() == [[-10, -20], [-30, -40], [-5000, -6000]]


def test_experts_without_a_row_give_no_row() -> None:
    out_RD = experts(torch.empty(0, 2), torch.tensor([0, 0]), torch.ones(2, 3, 2), torch.ones(2, 2, 3), abs)
    assert out_RD.shape == (0, 2)


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    silu_of_1 = 0.7310585786
    out_RF = swiglu(torch.tensor([[1.0, 0.0, -1.0, 10.0, 20.0, 30.0], [50.0, -50.0, 0.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(out_RF, torch.tensor([[10 * silu_of_1, 0, 30 * (silu_of_1 - 1)], [50, 0, 0]]))


def test_combine_weighs_and_adds_and_leaves_zeros() -> None:
    rows = SlotRows(torch.tensor([2, 0, 2]), torch.tensor([0.5, 2.0, 0.25]), torch.tensor([1, 2]))
    out_RD = torch.tensor([[2.0, 4.0], [1.0, 1.0], [8.0, 4.0]])
    assert combine(out_RD, rows, num_tokens=3).tolist() == [[2, 2], [0, 0], [3, 3]]
