"""What a file of another program holds, and its way into a RoutingTrace."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.trace import RoutingTrace
from exflow.profiling.validate import checked_integers, count_up, disordered_sequence


@dataclass(frozen=True, eq=False)
class ForeignTrace:
    """The arrays of one file as they are in it; None for what the file does not say.

    experts [tokens, layers, top_k] or [tokens, layers] ; sequence, position [tokens] ; weights like experts
    """

    path: Path
    experts: npt.NDArray[Any]
    sequence: npt.NDArray[Any] | None = None
    position: npt.NDArray[Any] | None = None
    weights: npt.NDArray[Any] | None = None
    num_experts: int | None = None
    experts_per_layer: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        experts = self.experts
        if experts.ndim not in (2, 3) or not experts.size:
            raise InputError(
                f"{self.path}: experts: shape is {experts.shape}; "
                f"give [tokens, layers, top_k] or [tokens, layers], none of them 0"
            )
        if experts.dtype.kind not in "iu":
            raise InputError(f"{self.path}: experts: dtype is {experts.dtype}; give integers")
        if experts.min() < 0:
            raise InputError(f"{self.path}: experts: holds {experts.min()}; ids start at 0")
        if self.weights is not None and self.weights.shape != experts.shape:
            raise InputError(
                f"{self.path}: weights: shape is {self.weights.shape}, experts has {experts.shape}; "
                f"give a weight for each id"
            )

    def trace(self, num_experts: int, experts_per_layer: tuple[int, ...] | None = None) -> RoutingTrace:
        """The validated trace; InputError, beginning with the file's name, where something does not fit.

        Sequences are renumbered 0, 1, ... in ascending order of their ids. Without ids, a position that does
        not advance begins a new sequence. If positions run backwards within a sequence, all rows are sorted
        by sequence and position, rows of equal position keeping their order.
        """
        try:
            sequence, position = self._places()
            fields: dict[str, Any] = {"experts": self.experts, "sequence": sequence, "position": position}
            if self.weights is not None:
                fields["weights"] = self.weights
            if disordered_sequence(sequence, position) is not None:
                order = np.lexsort((position, sequence))
                fields = {name: array[order] for name, array in fields.items()}
            return RoutingTrace.from_arrays(
                **fields, num_experts=num_experts, experts_per_layer=experts_per_layer
            )
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def _places(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Sequence and position [tokens] of each row, sequences numbered from 0."""
        tokens = (len(self.experts),)
        position = None
        if self.position is not None:
            position = checked_integers("pos", self.position, np.int32, tokens)
        if self.sequence is not None:
            ids = checked_integers("seq", self.sequence, np.int64, tokens, stop=1 << 63)
        elif position is not None:
            ids = np.cumsum(np.diff(position, prepend=-1) <= 0)
        else:
            ids = np.zeros(tokens, np.int64)
        sequence = np.unique(ids, return_inverse=True)[1].astype(np.int32)
        return sequence, count_up(sequence) if position is None else position


@contextmanager
def parsing(path: Path, remedy: str) -> Iterator[None]:
    """Around a parser of foreign bytes and nothing else: whatever it raises becomes an InputError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error
