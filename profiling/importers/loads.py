"""Loads alone: how often each expert was chosen, as engines count it where they do not record routing.

SGLang's recorder in the modes stat and stat_approx (sglang/srt/eplb/expert_distribution.py, 0.5.23) writes a
.pt file with `logical_count` [steps, hidden layers, experts]. As JSON: a table [layers][experts], which
LMDeploy reads too, or an object with such a `logical_count`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.importers.foreign import parsing
from exflow.profiling.importers.torch_file import load_torch

_REMEDY = "give SGLang's stat file, or JSON with a row of counts for each layer"


def read_loads(path: Path) -> npt.NDArray[np.float64]:
    """[layers, experts] of a file, summed over steps; dense layers have rows of zeros.

    Raises InputError for anything that is no table of finite numbers from 0 up.
    """
    counts = _content(path)
    if isinstance(counts, dict):
        counts = counts.get("logical_count")
    with parsing(path, _REMEDY):
        table = np.asarray(counts, dtype=np.float64)
    if table.ndim == 3:
        table = table.sum(axis=0)
    if table.ndim != 2 or not table.size:
        raise InputError(f"{path}: holds no table of layers and experts; {_REMEDY}")
    if not np.isfinite(table).all() or table.min() < 0:
        raise InputError(f"{path}: holds counts that are negative or not finite; {_REMEDY}")
    return table


def _content(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if is_archive:
        return load_torch(path, _REMEDY)
    with parsing(path, _REMEDY):
        return json.loads(path.read_bytes())
