"""Routing as read from files of another program, and the user's hints where the files are silent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.importers.left_out import LeftOut

IntArray = npt.NDArray[np.integer[Any]]

BLOCK_BYTES = 1 << 26  # of ids read at a time: large enough for speed, small beside the memory of any machine


@dataclass(frozen=True)
class Hints:
    """Facts about the model that the user gives; None leaves a fact to the files.

    num_experts    experts of a layer
    moe_layers     which of the recorded layers to keep, as hidden-layer indices, ascending
    hidden_layers  hidden layers of the model, dense ones included
    top_k          experts a token takes
    """

    num_experts: int | None = None
    moe_layers: tuple[int, ...] | None = None
    hidden_layers: int | None = None
    top_k: int | None = None


@dataclass(frozen=True, eq=False)
class ForeignRows:
    """Some tokens of one file, in the file's own integer types.

    path           the file, for errors
    layers         the hidden-layer index of each column of `experts`
    experts        [tokens, layers, top_k] logical ids
    sequence       [tokens] numbered from 0 over all files of the recording
    position       [tokens] ascending within a sequence, over all blocks
    phase          [tokens] PREFILL or DECODE
    weights        [tokens, layers, top_k] gate weights, where recorded
    hidden_layers  how many the model has, where the file says it; num_experts likewise
    num_bytes      the share of the input that these rows are, for progress
    """

    path: Path
    layers: tuple[int, ...]
    experts: IntArray
    sequence: IntArray
    position: IntArray
    phase: IntArray
    weights: npt.NDArray[Any] | None = None
    hidden_layers: int | None = None
    num_experts: int | None = None
    num_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Recording:
    """The files of one recording: what they say of the model, and their rows.

    `rows` may be called again, and then reads the files again: they can be larger than the memory. It counts
    what it leaves out.
    `experts_per_layer` is for the layers of the rows, before any are left out.
    """

    rows: Callable[[LeftOut], Iterator[ForeignRows]]
    num_experts: int | None = None
    experts_per_layer: tuple[int, ...] | None = None
    has_weights: bool = False


@contextmanager
def parsing(path: Path, remedy: str) -> Iterator[None]:
    """Around a parser of foreign bytes and nothing else: whatever it raises becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error
