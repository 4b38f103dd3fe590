"""Compiles functions with numba, and caches the code on disk where a folder can be written."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile `function`, for the types of its arguments when it is first called, or read it from the cache.

    The cache is numba's: `__pycache__` beside the source, or where NUMBA_CACHE_DIR says. Where it cannot be
    read or written, or finds no place at all, every process compiles anew. Calls do not hold Python's lock.
    """
    dispatcher: Any = njit(nogil=True)(function)
    with suppress(OSError, RuntimeError):  # numba's RuntimeError says that no folder will do
        dispatcher._cache = _LenientCache(function)  # type: ignore[no-untyped-call]
    result: Function = dispatcher
    return result


def cache_folder() -> Path | None:
    """Folder of numba's cache, by the example of this module; None if there is none."""
    with suppress(OSError, RuntimeError):
        return Path(FunctionCache(cache_folder).cache_path)  # type: ignore[no-untyped-call]
    return None


class _LenientCache(FunctionCache):
    """numba's cache, except that a failure never reaches the caller.

    Failures are errors of the file system, and whatever unpickling a damaged file raises.
    """

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)  # type: ignore[no-untyped-call]
        except Exception:
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]
        except Exception:
            # The index was written first, and may now name code that an older ExFlow left there.
            with suppress(OSError):
                Path(self._cache_file._index_path).unlink(missing_ok=True)
