"""Counts what an import leaves out while the files are read, and reports it once at the end."""

import logging

from exflow.errors import InputError

_log = logging.getLogger(__name__)

NOT_CAPTURED = "tokens whose routing was not captured"
IN_PART = "tokens whose routing was captured in part"
WITHOUT_TOKENS = "files without tokens"


class LeftOut:
    """Counts of left-out things by kind, each with the place of the first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, where: str, count: int = 1) -> None:
        """Count `count` of `what`, a plural noun; `where` begins with the file's name."""
        if count:
            before, first = self._found.get(what, (0, where))
            self._found[what] = (before + count, first)

    def tell(self) -> None:
        """Log a line for each."""
        for what, (count, first) in self._found.items():
            _log.warning("left out %d %s (the first: %s)", count, what, first)

    def all_of(self, path: object) -> InputError:
        """The error for an import that kept nothing; it names the first thing left out, else `path`."""
        for what, (count, first) in self._found.items():
            return InputError(f"{first}; left out {count} {what}, and no routing is left; record it again")
        return InputError(f"{path}: holds no routing of any token; record it again")
