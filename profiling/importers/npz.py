"""Plain .npz: an array `experts`; optionally `seq`, `pos`, `weights`, `num_experts`, `experts_per_layer`."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.importers.foreign import ForeignTrace, parsing

_NAMES = ("experts", "seq", "pos", "weights", "num_experts", "experts_per_layer")
_REMEDY = "give an .npz of plain numeric arrays (numpy.savez), with the ids under the name experts"


def read_npz(path: Path) -> ForeignTrace:
    """Read the arrays named above and leave others alone; nothing is unpickled.

    Raises InputError for a damaged archive, an object array, or an archive without `experts`.
    """
    with parsing(path, _REMEDY), path.open("rb") as file:
        archive = np.lib.npyio.NpzFile(file, allow_pickle=False)
        arrays = {name: archive[name] for name in _NAMES if name in archive.files}
    if "experts" not in arrays:
        raise InputError(f"{path}: has no array experts (it holds {', '.join(archive.files)}); {_REMEDY}")
    counts = _counts(path, arrays["experts_per_layer"]) if "experts_per_layer" in arrays else None
    num_experts = max(counts) if counts else None
    if "num_experts" in arrays:
        num_experts = _number(path, arrays["num_experts"])
    return ForeignTrace(
        path=path,
        experts=arrays["experts"],
        sequence=arrays.get("seq"),
        position=arrays.get("pos"),
        weights=arrays.get("weights"),
        num_experts=num_experts,
        experts_per_layer=counts,
    )


def _number(path: Path, array: npt.NDArray[Any]) -> int:
    if array.size != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{path}: num_experts: is {array.dtype} {array.shape}; give one integer")
    return int(array.item())


def _counts(path: Path, array: npt.NDArray[Any]) -> tuple[int, ...]:
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise InputError(
            f"{path}: experts_per_layer: is {array.dtype} {array.shape}; give one integer for each layer"
        )
    if array.min() < 1:
        raise InputError(f"{path}: experts_per_layer: holds {array.min()}; give 1 or more")
    return tuple(array.tolist())
