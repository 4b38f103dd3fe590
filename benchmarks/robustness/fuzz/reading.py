"""The contract of a reader for a damaged file: read it, or refuse it with an InputError of one line."""

import errno
import traceback
from collections.abc import Callable
from pathlib import Path

from exflow.errors import InputError


def crash_of(read: Callable[[Path], object], folder: Path) -> str | None:
    """The fault in how `read` handles the files in `folder`, or None."""
    try:
        read(folder)
    except (InputError, SystemExit) as error:
        if ran_out(error):
            return "an InputError because memory ran out"
        return "a message of several lines" if "\n" in str(error) else None
    except BaseException as error:  # PanicException of a Rust library is no Exception
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "/exflow/" in frame.filename
        ]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} at {where}"
    return None


def ran_out(error: BaseException | None) -> bool:
    """True if refused memory is behind the error."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        error = error.__cause__ or error.__context__
    return False
