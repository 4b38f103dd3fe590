"""Contract of every back end of the expert MLP; a new one is tested by being in BACKENDS."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exflow.kernels.experts import BACKENDS, Backend, expert_mlp, megablocks_experts
from exflow.kernels.reference import Activation, ClampedSwiglu, swiglu

torch.set_num_threads(1)
each_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "megablocks"])
CLAMPED = ClampedSwiglu(alpha=1.7, limit=2.0)
each_activation = pytest.mark.parametrize("activation", [F.gelu, swiglu, CLAMPED])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@dataclass
class Case:
    """Random inputs of an expert MLP: D = 8, F = 16, and W = 32 where it is gated, with biases or without."""

    hidden_TD: Tensor
    slots_TK: Tensor
    weights_TK: Tensor
    w_in_SWD: Tensor
    w_out_SDF: Tensor
    activation: Activation
    b_in_SW: Tensor | None = None
    b_out_SD: Tensor | None = None

    @classmethod
    def random(
        cls,
        num_tokens: int,
        top_k: int,
        num_slots: int,
        activation: Activation = F.gelu,
        seed: int = 0,
        biases: bool = False,
    ) -> "Case":
        generator = torch.Generator().manual_seed(seed)
        rows = 16 if activation is F.gelu else 32
        return cls(
            torch.randn(num_tokens, 8, generator=generator),
            torch.randint(-1, num_slots, (num_tokens, top_k), generator=generator),
            torch.rand(num_tokens, top_k, generator=generator),
            torch.randn(num_slots, rows, 8, generator=generator),
            torch.randn(num_slots, 8, 16, generator=generator),
            activation,
            torch.randn(num_slots, rows, generator=generator) if biases else None,
            torch.randn(num_slots, 8, generator=generator) if biases else None,
        )

    def run(self, backend: Backend) -> Tensor:
        return expert_mlp(
            self.hidden_TD,
            self.slots_TK,
            self.weights_TK,
            self.w_in_SWD,
            self.w_out_SDF,
            self.activation,
            backend,
            self.b_in_SW,
            self.b_out_SD,
        )

    def naive(self) -> Tensor:
        """A loop over tokens and a loop over their choices."""
        out = []
        for token, hidden_D in enumerate(self.hidden_TD):
            total_D = torch.zeros_like(hidden_D)
            for slot, weight in zip(self.slots_TK[token].tolist(), self.weights_TK[token], strict=True):
                if slot != -1:
                    b_in_W = 0 if self.b_in_SW is None else self.b_in_SW[slot]
                    b_out_D = 0 if self.b_out_SD is None else self.b_out_SD[slot]
                    inner_F = self.naive_inner(self.w_in_SWD[slot] @ hidden_D + b_in_W)
                    total_D = total_D + weight * (self.w_out_SDF[slot] @ inner_F + b_out_D)
            out.append(total_D)
        return torch.stack(out) if out else self.hidden_TD

    def naive_inner(self, x_W: Tensor) -> Tensor:
        if self.activation is F.gelu:
            return self.activation(x_W)
        if self.activation is CLAMPED:
            gates, ups = x_W[:16].clip(max=2.0), x_W[16:].clip(-2.0, 2.0)
            return torch.stack(
                [(up + 1) * gate / (1 + torch.exp(-1.7 * gate)) for gate, up in zip(gates, ups, strict=True)]
            )
        return torch.stack([x_W[i] / (1 + torch.exp(-x_W[i])) * x_W[16 + i] for i in range(16)])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.tuples(st.integers(0, 12), st.integers(1, 3), st.integers(1, 4)))
    activation = draw(st.sampled_from([F.gelu, swiglu, CLAMPED]))
    return Case.random(*shape, activation, draw(st.integers(0, 2**32)), draw(st.booleans()))


@each_backend
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_equals_the_loop_over_tokens_and_choices(backend: Backend, case: Case) -> None:
    torch.testing.assert_close(case.run(backend), case.naive(), rtol=1e-4, atol=1e-4)


@each_backend
def test_partial_sums_of_the_ranks_add_up_to_the_layer(backend: Backend) -> None:
    whole = Case.random(num_tokens=20, top_k=2, num_slots=6)
    expert_TK = whole.slots_TK.clamp(min=0)
    whole.slots_TK = expert_TK
    partial = []
    for held in ([4, 0], [1, 5], [3, 2]):  # the experts of three ranks, slot by slot
        slot_of_expert = torch.full((6,), -1)
        slot_of_expert[held] = torch.arange(2)
        rank = Case(
            whole.hidden_TD,
            slot_of_expert[expert_TK],
            whole.weights_TK,
            whole.w_in_SWD[held],
            whole.w_out_SDF[held],
            whole.activation,
        )
        partial.append(rank.run(backend))
    torch.testing.assert_close(sum(partial), whole.run(backend), rtol=1e-4, atol=1e-4)


@each_backend
@each_activation
def test_gradients_are_those_of_the_loop(backend: Backend, activation: Activation) -> None:
    case = Case.random(num_tokens=10, top_k=2, num_slots=5, activation=activation, biases=True)
    case.slots_TK[case.slots_TK == 3] = -1  # an expert without a token has gradient zero, not none
    assert case.b_in_SW is not None and case.b_out_SD is not None
    inputs = [case.hidden_TD, case.weights_TK, case.w_in_SWD, case.w_out_SDF, case.b_in_SW, case.b_out_SD]
    for value in inputs:
        value.requires_grad_()
    mix_TD = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((case.run(backend) * mix_TD).sum(), inputs)
    loop = torch.autograd.grad((case.naive() * mix_TD).sum(), inputs)
    for found, expected in zip(ours, loop, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not ours[2][3].any()


@each_backend
def test_no_token_has_an_expert_here(backend: Backend) -> None:
    case = Case.random(num_tokens=4, top_k=2, num_slots=3)
    case.slots_TK = torch.full((4, 2), -1)
    assert case.run(backend).tolist() == torch.zeros(4, 8).tolist()


@each_backend
@each_activation
def test_bf16_stays_bf16(backend: Backend, activation: Activation) -> None:
    case = Case.random(num_tokens=6, top_k=2, num_slots=3, activation=activation)
    exact_TD = case.run("reference")
    for name in ("hidden_TD", "w_in_SWD", "w_out_SDF"):
        setattr(case, name, getattr(case, name).bfloat16())
    out_TD = case.run(backend)
    assert out_TD.dtype == torch.bfloat16
    torch.testing.assert_close(out_TD.float(), exact_TD, rtol=0.05, atol=0.3)


def test_megablocks_says_what_it_cannot_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it takes part in the test on a GPU, where it is installed."""
    monkeypatch.setitem(sys.modules, "megablocks", SimpleNamespace(grouped_gemm_util=None))
    case = Case.random(num_tokens=4, top_k=2, num_slots=3)
    with pytest.raises(ValueError, match=r"bfloat16 on GPUs, not torch.float32 on cpu"):
        megablocks_experts(case.hidden_TD, torch.tensor([4]), case.w_in_SWD, case.w_out_SDF, F.gelu)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_agrees_with_the_loop(backend: Backend, activation: Activation, dtype: torch.dtype) -> None:
    if backend == "megablocks" and dtype == torch.float32:
        pytest.skip("megablocks multiplies bfloat16 alone")
    for num_tokens in (0, 1, 50):
        case = Case.random(num_tokens, top_k=2, num_slots=5, activation=activation)
        exact_TD = case.naive()
        for name in ("slots_TK", "weights_TK"):
            setattr(case, name, getattr(case, name).cuda())
        for name in ("hidden_TD", "w_in_SWD", "w_out_SDF"):
            setattr(case, name, getattr(case, name).to("cuda", dtype))
        out_TD = case.run(backend)
        assert out_TD.dtype == dtype
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
        torch.testing.assert_close(out_TD.cpu().float(), exact_TD, **close)


@each_backend
def test_shapes_that_do_not_fit_are_named(backend: Backend) -> None:
    case = Case.random(num_tokens=4, top_k=2, num_slots=3)
    case.weights_TK = case.weights_TK[:, :1]
    with pytest.raises(ValueError, match=r"slots \(4, 2\) and weights \(4, 1\) must be equal"):
        case.run(backend)
    case = Case.random(num_tokens=4, top_k=2, num_slots=3)
    case.hidden_TD = case.hidden_TD[:3]
    with pytest.raises(ValueError, match=r"one row a token \(hidden \(3, 8\)\)"):
        case.run(backend)
    case = Case.random(num_tokens=4, top_k=2, num_slots=3)
    case.w_out_SDF = case.w_out_SDF[:2]
    with pytest.raises(ValueError, match=r"w_in \(3, 16, 8\) must be \[S, W, D\] = \(2, 16, 8\), as w_out"):
        case.run(backend)
    case = Case.random(num_tokens=4, top_k=2, num_slots=3)
    case.activation = swiglu
    with pytest.raises(ValueError, match=r"w_in \(3, 16, 8\) must be \[S, W, D\] = \(3, 32, 8\), as w_out"):
        case.run(backend)
    case = Case.random(num_tokens=4, top_k=2, num_slots=3, biases=True)
    case.b_out_SD = torch.zeros(3, 16)
    with pytest.raises(ValueError, match=r"b_out \(3, 16\) must be \(3, 8\), as the matrices imply"):
        case.run(backend)
    case = Case.random(num_tokens=4, top_k=2, num_slots=3)
    case.hidden_TD = case.hidden_TD[:, :6]
    with pytest.raises(ValueError, match=r"with the D of hidden \(4, 6\)"):
        case.run(backend)


def test_grouped_mm_names_a_width_it_cannot_take() -> None:
    case = Case.random(num_tokens=4, top_k=2, num_slots=3)
    case.w_in_SWD, case.w_out_SDF = case.w_in_SWD[:, :6], case.w_out_SDF[:, :, :6]
    with pytest.raises(ValueError, match=r"a width of 6 is not a multiple of 16 bytes in torch.float32"):
        case.run("grouped_mm")
    torch.testing.assert_close(case.run("reference"), case.naive(), rtol=1e-4, atol=1e-4)
