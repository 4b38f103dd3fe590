"""The import command: turns recordings of other engines into a trace."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from exflow.errors import InputError
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.registry import import_trace

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def run_import(
    files: Sequence[Path],
    output: Path,
    format: str | None,
    hints: Hints,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Import `files` to `output`. Returns the size of the trace, for printing.

    advance: called with the number of bytes done, and of all bytes.
    """
    done = import_trace(files, output, format, hints, advance)
    return {
        "trace": str(output),
        "model": done.layout.model,
        "tokens": done.num_tokens,
        "sequences": done.num_sequences,
        "moe_layers": done.layout.num_layers,
        "experts": done.layout.num_experts,
        "top_k": done.layout.top_k,
    }


def layer_numbers(text: str | None) -> tuple[int, ...] | None:
    """The numbers in "0,2,5-8", ascending. Raises InputError for anything else, and for a number twice."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise InputError(f"--moe-layers {text}: {part!r} is no layer or range; give as 1-26 or 0,2,4")
        numbers.extend(range(first, last + 1))
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--moe-layers {text}: names a layer twice; give 1-26 or 0,2,4")
    return tuple(sorted(numbers))
