"""Which hidden layers route: engines that record all of them leave a mark where there is no router.

SGLang 0.5.23 (state_capturer/base.py) and vLLM 0.33.0 (fused_moe/routed_experts_capturer.py) return routing
from buffers of zeros, SGLang's recorder (eplb/expert_distribution.py) has buffers of -1, and only the layers
with a router write into them. A token that was never captured bears the mark in all layers.

Shapes: T tokens, H hidden layers, k choices.
"""

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.importers.foreign import IntArray

Mask = npt.NDArray[np.bool_]

_log = logging.getLogger(__name__)


class RoutedLayers:
    """Finds the MoE layers in the first rows and holds later ones to them; `given` ones are not sought."""

    def __init__(self, given: tuple[int, ...] | None) -> None:
        self._given = given
        self._layers: tuple[int, ...] = ()
        self._lost = 0

    def split_zeros(self, path: Path, experts: IntArray) -> tuple[tuple[int, ...], Mask]:
        """`split` for `experts` [T, H, k] where zeros are the mark: no router takes expert 0 twice.

        With k = 1 zeros may be routing, so all tokens count as captured, and InputError asks for the layers
        where the first rows have a layer of zeros.
        """
        if experts.shape[2] > 1 or not len(experts):
            return self.split(path, np.any(experts, axis=2))
        if not self._layers and self._given is None:
            zeros = np.flatnonzero(~experts.any(axis=(0, 2)))
            if len(zeros):
                raise InputError(
                    f"{path}: layer {zeros[0]} holds expert 0 for every token, which a dense layer does too; "
                    "give --moe-layers"
                )
            self._layers = tuple(range(experts.shape[1]))
        return self._chosen(path, experts.shape[1]), np.ones(len(experts), np.bool_)

    def split(self, path: Path, routed_TH: Mask) -> tuple[tuple[int, ...], Mask]:
        """The MoE layers, and which tokens [T] were captured; `routed_TH` says where there is no mark.

        Raises InputError where a layer routes some tokens and not others.
        """
        captured: Mask = np.any(routed_TH, axis=1)
        self._lost += len(captured) - int(captured.sum())
        if not captured.any():
            return self._layers, captured
        if not self._layers and self._given is None:
            self._layers = tuple(np.flatnonzero(routed_TH.any(axis=0)).tolist())
        layers = self._chosen(path, routed_TH.shape[1])
        _check_complete(path, routed_TH[captured], layers)
        if self._given is None:
            _check_no_others(path, routed_TH, layers)
        return layers, captured

    def report(self) -> None:
        """Log what was left out."""
        if self._lost:
            _log.warning("left out %d tokens whose routing was not captured", self._lost)

    def _chosen(self, path: Path, num_layers: int) -> tuple[int, ...]:
        chosen = self._layers if self._given is None else self._given
        if chosen[-1] >= num_layers:
            raise InputError(
                f"{path}: has {num_layers} layers, layer {chosen[-1]} is not among them; give --moe-layers "
                "below, or import models one by one"
            )
        return chosen


def _check_complete(path: Path, routed_TH: Mask, layers: tuple[int, ...]) -> None:
    partly = np.flatnonzero(~routed_TH[:, list(layers)].all(axis=0))
    if len(partly):
        layer = layers[partly[0]]
        token = int(np.argmin(routed_TH[:, layer]))
        raise InputError(
            f"{path}: layer {layer} holds no routing of token {token}, other layers do; record it again, or "
            "give --moe-layers without it"
        )


def _check_no_others(path: Path, routed_TH: Mask, layers: tuple[int, ...]) -> None:
    others: Mask = np.any(routed_TH, axis=0)
    others[list(layers)] = False
    if others.any():
        raise InputError(
            f"{path}: layer {np.argmax(others)} routes here, and not in the rows before; "
            "import models one by one"
        )
