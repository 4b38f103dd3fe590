"""The original ExFlow's .npy: integers [tokens, layers], the expert of a top-1 router."""

from pathlib import Path

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.foreign import ForeignTrace, parsing

_REMEDY = "give an .npy of integers [tokens, layers] (numpy.save)"


def read_npy(path: Path) -> ForeignTrace:
    """Map the array; nothing is unpickled. The file knows no sequences: all tokens are of one.

    Raises InputError for a damaged file, an object array, or an array that is not two-dimensional.
    """
    with parsing(path, _REMEDY):
        experts = np.lib.format.open_memmap(path, mode="r")
    if experts.ndim != 2:
        raise InputError(
            f"{path}: shape is {experts.shape}; {_REMEDY}, or [tokens, layers, top_k] as experts in an .npz"
        )
    return ForeignTrace(path=path, experts=experts)
