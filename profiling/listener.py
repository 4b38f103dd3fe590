"""The two sides of a recording: a model that announces its routing, and what listens to it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from exflow.profiling.layout import RoutingLayout

if TYPE_CHECKING:
    from torch import Tensor


class RoutingListener(Protocol):
    """Is told the routing of one MoE layer for the T tokens of a forward pass.

    `layer` is the MoE layer's index l, `expert_ids` [T, k] int64 (logical ids, first choice first), `weights`
    [T, k] floating point, `sequence` and `position` [T] integers, `phase` PREFILL or DECODE; a row whose
    sequence is -1 is padding. In a pass the layers come in order 0..L-1, each with the same rows. The
    listener may keep the tensors until the pass is over: they must not be overwritten before that.
    """

    def __call__(
        self,
        layer: int,
        expert_ids: "Tensor",
        weights: "Tensor",
        sequence: "Tensor",
        position: "Tensor",
        phase: int,
    ) -> None: ...


@runtime_checkable
class Recordable(Protocol):
    """A model that announces its routing."""

    def routing_layout(self) -> RoutingLayout:
        """The MoE layers and their numbers of experts."""

    def add_routing_listener(self, listener: RoutingListener) -> Callable[[], None]:
        """Call `listener` from now on, until the function returned is called."""
