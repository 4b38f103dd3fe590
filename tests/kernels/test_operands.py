"""Assertions of the kernels' wrappers."""

import pytest
import torch

from exflow.kernels.operands import expect, power_of_2


def test_a_tensor_that_does_not_fit_is_named() -> None:
    good = torch.zeros(4, 2)
    expect(torch.float32, (4, 2), good=good)
    for bad in (good.int(), good[:2], torch.zeros(2, 4).T):
        with pytest.raises(AssertionError, match=r"^bad: .* must be torch.float32 \(4, 2\), contiguous"):
            expect(torch.float32, (4, 2), good=good, bad=bad)


def test_powers_of_2() -> None:
    assert [power_of_2(size) for size in (1, 2, 3, 4, 5, 96, 2880)] == [1, 2, 4, 4, 8, 128, 4096]
