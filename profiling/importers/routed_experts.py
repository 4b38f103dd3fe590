"""The ids of one sequence as a response holds them: base64 text, or lists of lists of lists."""

import base64
import binascii
import io
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.importers.arrays import ArrayStream
from exflow.profiling.importers.foreign import Hints, IntArray
from exflow.profiling.importers.json_values import shown

_NPY = b"\x93NUMPY"


def is_empty(value: Any) -> bool:
    """True if a server wrote `value` for a sequence of which it has no row."""
    return value is None or value == "" or value == []


def ids_of(where: str, value: Any, hints: Hints) -> IntArray:
    """[tokens, hidden layers, top_k] of what is not empty.

    Text is base64 of a .npy file (vLLM), or of int32 without a shape (SGLang), for which the hints say it.
    Raises InputError, beginning with `where`, for anything else and for another shape.
    """
    if isinstance(value, list):
        return _of_lists(where, value)
    if not isinstance(value, str):
        raise InputError(f"{where}: is {shown(value)}; give the base64 text as the server wrote it")
    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: is not base64 ({error}); give the text as the server wrote it") from error
    return _of_npy(where, content) if content.startswith(_NPY) else _of_int32(where, content, hints)


def _of_lists(where: str, value: list[Any]) -> IntArray:
    try:
        array = np.array(value)
    except ValueError as error:  # of different lengths
        raise InputError(
            f"{where}: is {shown(value)}, lists of different lengths; give the response whole"
        ) from error
    return _checked(where, array)


def _of_npy(where: str, content: bytes) -> IntArray:
    try:
        array = ArrayStream(io.BytesIO(content), len(content)).whole()
    except Exception as error:  # numpy's parser of headers raises what it likes
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: is no .npy file ({reason}); give the response whole") from error
    return _checked(where, array)


def _checked(where: str, array: npt.NDArray[Any]) -> IntArray:
    if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape[1:]:
        raise InputError(
            f"{where}: is {array.dtype} {array.shape}; give integers [tokens, hidden layers, top_k]"
        )
    return array


def _of_int32(where: str, content: bytes, hints: Hints) -> IntArray:
    if hints.hidden_layers is None or hints.top_k is None:
        raise InputError(
            f"{where}: is SGLang's, which says no shape; give hidden_layers and top_k (num_hidden_layers "
            "and num_experts_per_tok in the model's config.json)"
        )
    width = 4 * hints.hidden_layers * hints.top_k
    if len(content) % width:
        raise InputError(
            f"{where}: has {len(content)} bytes, no multiple of {width} for a token (int32, "
            f"{hints.hidden_layers} layers, top {hints.top_k}); give the right hidden_layers and top_k"
        )
    return np.frombuffer(content, "<i4").reshape(-1, hints.hidden_layers, hints.top_k)
