"""Finds the layers that route: engines that record all hidden layers leave a mark where there is no router.

SGLang 0.5.23 (state_capturer/base.py) and vLLM 0.33.0 (fused_moe/routed_experts_capturer.py) return routing
from buffers of zeros, SGLang's recorder (eplb/expert_distribution.py) has buffers of -1, and only the layers
with a router write into them. A token that was never captured bears the mark in all layers; what programs
between an engine and a file leave open is -1 as well.

Shapes: T tokens, H hidden layers, k choices.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.foreign import IntArray
from exflow.profiling.importers.gaps import Mask, count_gaps, gaps, may_have_gaps
from exflow.profiling.importers.left_out import LeftOut


@dataclass(frozen=True, eq=False)
class Routed:
    """The kept part of an array [T, H, k]: its `columns`, which are the hidden `layers`, for the tokens
    `whole`.

    hidden_layers  how many the model has; None where the array has rows of MoE layers alone
    """

    columns: list[int]
    layers: tuple[int, ...]
    hidden_layers: int | None
    whole: Mask


class RoutedLayers:
    """Finds the MoE layers in the first rows and holds later ones to them; `given` layers are not sought.

    Where an array has as many columns as `given` has layers, and not all of these are column numbers, `given`
    names its columns: some versions of vLLM record MoE layers alone.
    """

    def __init__(self, given: tuple[int, ...] | None, left: LeftOut) -> None:
        self._given = given
        self._left = left
        self._layers: tuple[int, ...] = ()

    def split_zeros(self, path: Path, experts: IntArray) -> Routed:
        """`split` for `experts` [T, H, k] where zeros are the mark, or -1: no router takes expert 0 twice.

        With k = 1 zeros may be routing, so all tokens count as captured, and InputError asks for the layers
        where the first rows have a layer of zeros.
        """
        if experts.min(initial=0) < -1:
            raise InputError(f"{path}: experts: holds {experts.min()}; ids start at 0")
        gaps_TH: Mask = np.zeros(experts.shape[:2], np.bool_)
        ids_TH: Mask = np.any(experts, axis=2)
        if may_have_gaps(experts):
            gaps_THk = gaps(experts)
            gaps_TH = np.any(gaps_THk, axis=2)
            ids_TH = np.any((experts != 0) & ~gaps_THk, axis=2)
        if experts.shape[2] > 1:
            return self.split(path, ids_TH, gaps_TH)
        captured = ~gaps_TH.all(axis=1)
        if not self._layers and self._given is None and captured.any():
            zeros = np.flatnonzero((experts[captured] == 0).all(axis=(0, 2)))
            if len(zeros):
                raise InputError(
                    f"{path}: layer {zeros[0]} holds expert 0 for every token, which a dense layer does too; "
                    "give moe_layers"
                )
        return self.split(path, ~gaps_TH, gaps_TH)

    def split(self, path: Path, routed_TH: Mask, gaps_TH: Mask) -> Routed:
        """The MoE layers, and the tokens that were captured in all of them.

        routed_TH  where a token has ids
        gaps_TH    where some are missing by a mark that is never an id; the token is left out

        Raises InputError where a layer routes some tokens and not others, and nothing marks a gap.
        """
        captured: Mask = np.any(routed_TH, axis=1)
        columns = self._layers
        if captured.any():
            if not self._layers and self._given is None:
                self._layers = tuple(np.flatnonzero(routed_TH.any(axis=0)).tolist())
            columns = self._columns(path, routed_TH.shape[1])
        whole: Mask = captured & ~gaps_TH[:, list(columns)].any(axis=1)
        _check_complete(path, routed_TH, whole, columns)
        if self._given is None:
            _check_no_others(path, routed_TH, columns)
        count_gaps(str(path), whole, captured, self._left)
        if self._given is not None and self._names(routed_TH.shape[1]):
            return Routed(list(columns), self._given, None, whole)
        return Routed(list(columns), columns, routed_TH.shape[1], whole)

    def _columns(self, path: Path, num_layers: int) -> tuple[int, ...]:
        chosen = self._layers if self._given is None else self._given
        if self._names(num_layers):
            return tuple(range(num_layers))
        if chosen[-1] >= num_layers:
            raise InputError(
                f"{path}: has {num_layers} layers, layer {chosen[-1]} is not among them; give moe_layers "
                "below, or import models one by one"
            )
        return chosen

    def _names(self, num_layers: int) -> bool:
        return self._given is not None and len(self._given) == num_layers <= self._given[-1]


def _check_complete(path: Path, routed_TH: Mask, whole: Mask, layers: tuple[int, ...]) -> None:
    lacking: Mask = whole & ~routed_TH[:, list(layers)].all(axis=1)
    if lacking.any():
        token = int(np.argmax(lacking))
        layer = layers[int(np.argmin(routed_TH[token, list(layers)]))]
        raise InputError(
            f"{path}: layer {layer} holds no routing of token {token}, other layers do; record it again, or "
            "give moe_layers without it"
        )


def _check_no_others(path: Path, routed_TH: Mask, layers: tuple[int, ...]) -> None:
    others: Mask = np.any(routed_TH, axis=0)
    others[list(layers)] = False
    if others.any():
        raise InputError(
            f"{path}: layer {np.argmax(others)} routes here, and not in the rows before; "
            "import models one by one"
        )
