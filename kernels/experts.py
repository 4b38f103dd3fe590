"""Expert MLP over the slots of one rank, with interchangeable backends for its two products."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from exflow.kernels import reference
from exflow.kernels.reference import Activation

Backend = Literal["reference", "grouped_mm", "megablocks"]


def expert_mlp(
    hidden_TD: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    w_in_SWD: Tensor,
    w_out_SDF: Tensor,
    activation: Activation,
    backend: Backend,
    b_in_SW: Tensor | None = None,
    b_out_SD: Tensor | None = None,
) -> Tensor:
    """Weighted sum [T, D] over each token's experts on this rank.

    slots_TK: local slots, -1 for an expert on another rank. The sum of the results over all ranks is the
    layer's output. The activation determines W (reference.rows_of_w_in). Differentiable.
    Raises ValueError for shapes that do not fit.
    """
    if slots_TK.shape != weights_TK.shape or len(slots_TK) != len(hidden_TD):
        raise ValueError(
            f"slots {tuple(slots_TK.shape)} and weights {tuple(weights_TK.shape)} must be equal, with one "
            f"row a token (hidden {tuple(hidden_TD.shape)})"
        )
    num_slots, hidden, inner = w_out_SDF.shape
    expected = (num_slots, reference.rows_of_w_in(inner, activation), hidden)
    if hidden != hidden_TD.shape[1] or w_in_SWD.shape != expected:
        raise ValueError(
            f"w_in {tuple(w_in_SWD.shape)} must be [S, W, D] = {expected}, as w_out [S, D, F] = "
            f"{tuple(w_out_SDF.shape)} implies, with the D of hidden {tuple(hidden_TD.shape)}"
        )
    for name, bias, size in (("b_in", b_in_SW, expected[:2]), ("b_out", b_out_SD, (num_slots, hidden))):
        if bias is not None and bias.shape != size:
            raise ValueError(f"{name} {tuple(bias.shape)} must be {size}, as the matrices imply")
    rows = reference.dispatch(slots_TK, weights_TK, num_slots)
    out_RD = BACKENDS[backend](
        hidden_TD[rows.token_R], rows.counts_S, w_in_SWD, w_out_SDF, activation, b_in_SW, b_out_SD
    )
    return reference.combine(out_RD, rows, num_tokens=len(hidden_TD))


def grouped_experts(
    rows_RD: Tensor,
    counts_S: Tensor,
    w_in_SWD: Tensor,
    w_out_SDF: Tensor,
    activation: Activation,
    b_in_SW: Tensor | None = None,
    b_out_SD: Tensor | None = None,
) -> Tensor:
    """`reference.experts` as two torch grouped products; one kernel each for bf16 on SM90 and later.

    Raises ValueError if a row of the weights is not a multiple of 16 bytes.
    """
    for width in w_out_SDF.shape[1:]:
        if width * rows_RD.element_size() % 16:
            raise ValueError(
                f"a width of {width} is not a multiple of 16 bytes in {rows_RD.dtype}, which grouped_mm needs"
            )
    ends_S = counts_S.cumsum(0).to(torch.int32)

    def multiply(rows: Tensor, matrices: Tensor) -> Tensor:
        return grouped_mm(rows, matrices.mT, offs=ends_S)

    inner_RF = activation(_with_biases(multiply(rows_RD, w_in_SWD), counts_S, b_in_SW))
    return _with_biases(multiply(inner_RF, w_out_SDF), counts_S, b_out_SD)


def megablocks_experts(
    rows_RD: Tensor,
    counts_S: Tensor,
    w_in_SWD: Tensor,
    w_out_SDF: Tensor,
    activation: Activation,
    b_in_SW: Tensor | None = None,
    b_out_SD: Tensor | None = None,
) -> Tensor:
    """`reference.experts` by the grouped products of megablocks (0.10), which need the counts on the host.

    Experimental: written from the source of megablocks, and not yet run (0.10 pins another torch).
    Raises ValueError for anything but bfloat16 on a GPU.
    """
    from megablocks import grouped_gemm_util

    if rows_RD.dtype != torch.bfloat16 or not rows_RD.is_cuda:
        raise ValueError(f"megablocks multiplies bfloat16 on GPUs, not {rows_RD.dtype} on {rows_RD.device}")
    multiply, sizes_S = grouped_gemm_util.ops.gmm, counts_S.to("cpu", torch.int64)
    inner_RW = multiply(rows_RD, w_in_SWD, sizes_S, trans_b=True)
    inner_RF = activation(_with_biases(inner_RW, counts_S, b_in_SW))
    return _with_biases(multiply(inner_RF, w_out_SDF, sizes_S, trans_b=True), counts_S, b_out_SD)


def _with_biases(rows_RN: Tensor, counts_S: Tensor, biases_SN: Tensor | None) -> Tensor:
    """Add each slot's bias to its rows."""
    if biases_SN is None:
        return rows_RN
    return rows_RN + biases_SN.repeat_interleave(counts_S, dim=0, output_size=len(rows_RN))


def _has_megablocks() -> bool:
    """True if megablocks and its package of grouped products (grouped_gemm) are installed."""
    return all(find_spec(name) is not None for name in ("megablocks", "grouped_gemm"))


ExpertsBackend = Callable[[Tensor, Tensor, Tensor, Tensor, Activation, Tensor | None, Tensor | None], Tensor]
BACKENDS: dict[Backend, ExpertsBackend] = {"reference": reference.experts, "grouped_mm": grouped_experts}
if _has_megablocks():
    BACKENDS["megablocks"] = megablocks_experts
