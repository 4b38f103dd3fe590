"""The foreign trace formats by name, and reading files of one of them as a trace."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from exflow.errors import InputError
from exflow.files import atomic_folder
from exflow.profiling.importers.foreign import ForeignRows, Hints, Recording
from exflow.profiling.importers.gaps import without_gaps
from exflow.profiling.importers.left_out import LeftOut
from exflow.profiling.importers.megatron import open_megatron
from exflow.profiling.importers.npy import open_npy
from exflow.profiling.importers.npz import open_npz
from exflow.profiling.importers.responses import open_responses
from exflow.profiling.importers.sglang import open_sglang
from exflow.profiling.importers.sniffing import (
    is_blank,
    is_json,
    is_megatron,
    is_safetensors,
    is_text,
    is_torch,
    is_zip,
    start_of,
    unknown,
)
from exflow.profiling.importers.translation import Translation, check_rows, kept_columns
from exflow.profiling.importers.trtllm import open_trtllm
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.shard import Rows, concatenate, num_rows
from exflow.profiling.trace import RoutingTrace
from exflow.profiling.writer import TraceWriter, check_replaceable

_log = logging.getLogger(__name__)

_SHARD_TOKENS = 1 << 18  # some 100 MB: few files for a long trace, and no burden on the memory

Advance = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@dataclass(frozen=True)
class ForeignFormat:
    """A foreign trace format.

    matches  tells by a file's first bytes whether it is of this format
    open     opens the files of one recording
    """

    matches: Callable[[bytes], bool]
    open: Callable[[Sequence[Path], Hints], Recording]


FORMATS = {
    "sglang": ForeignFormat(is_torch, open_sglang),
    "npz": ForeignFormat(is_zip, open_npz),
    "npy": ForeignFormat(lambda start: start.startswith(b"\x93NUMPY"), open_npy),
    "trtllm": ForeignFormat(is_safetensors, open_trtllm),
    "megatron": ForeignFormat(is_megatron, open_megatron),
    "responses": ForeignFormat(is_json, open_responses),
}


@dataclass(frozen=True)
class Imported:
    """The result of an import: the model's routed part, tokens and sequences written."""

    layout: RoutingLayout
    num_tokens: int
    num_sequences: int


def read_trace(
    paths: Sequence[str | Path], format: str | None = None, hints: Hints | None = None
) -> RoutingTrace:
    """The routing in `paths`, the files of one recording, as one trace in memory.

    `format` is a name of FORMATS; without it the files' content decides. The number of experts is the hint,
    else what the files say, else the largest id plus 1 (with a logged warning). Sequences of different files
    stay apart where the format knows them: they are numbered 0, 1, ... over all files, so that their homes
    spread over ranks. Raises InputError naming the file that does not fit.
    """
    files = [Path(path) for path in paths]
    translation, blocks = _opened(files, format, hints or Hints(), lambda done, total: None)
    return RoutingTrace.from_rows(concatenate(list(blocks)), translation.layout)


def import_trace(
    paths: Sequence[Path], output: Path, format: str | None, hints: Hints, advance: Advance
) -> Imported:
    """Write the routing in `paths` as a trace at `output`, block by block, in memory that does not grow.

    As read_trace. A trace at `output` is replaced when the new one is complete: an error leaves it as it was.
    """
    check_replaceable(output)
    translation, blocks = _opened(paths, format, hints, advance)
    tokens, sequences = 0, set[int]()
    with atomic_folder(output) as folder:
        writer = TraceWriter(
            folder, translation.layout, has_weights=translation.has_weights, shard_tokens=_SHARD_TOKENS
        )
        for rows in blocks:
            writer.append(rows)
            tokens += num_rows(rows)
            sequences.update(np.unique(rows["sequence"]).tolist())
        writer.close()
    return Imported(translation.layout, tokens, len(sequences))


def _opened(
    paths: Sequence[Path], format: str | None, hints: Hints, advance: Advance
) -> tuple[Translation, Iterator[Rows]]:
    """The translation from the files' rows to rows of a trace, and the translated rows."""
    if not paths:
        raise InputError("import: no files given; name at least one")
    full = [path for path in paths if not is_blank(path)]
    if not full:
        raise InputError(f"{paths[0]}: is empty; record it again")
    recording = _format_of(full, format).open(full, hints)
    progress = _Progress(full, advance)
    left, blocks = _begun(recording, hints, paths)
    first = next(blocks, None)
    if first is None:
        raise left.all_of(paths[0])
    claims = (hints.num_experts, recording.num_experts, first.num_experts)
    number = next((claim for claim in claims if claim is not None), None)
    if number is None:
        progress.rounds = 2
        number = _largest_id(chain([first], blocks), hints, progress) + 1
        _log.warning("the files do not say num_experts: taken as %d, the largest id plus 1", number)
        left, blocks = _begun(recording, hints, paths)
        first = next(blocks)
    translation = Translation.of(first, number, recording, hints)
    return translation, _translated(translation, chain([first], blocks), progress, left)


def _translated(
    translation: Translation, blocks: Iterator[ForeignRows], progress: "_Progress", left: LeftOut
) -> Iterator[Rows]:
    """Yield the translated rows of the blocks, then log what was left out."""
    for block in blocks:
        yield translation.rows(progress.passing(block))
    left.tell()


def _begun(
    recording: Recording, hints: Hints, paths: Sequence[Path]
) -> tuple[LeftOut, Iterator[ForeignRows]]:
    """Begin a pass over the files: (counter of what is left out, blocks that hold whole tokens)."""
    left = LeftOut()
    for path in filter(is_blank, paths):
        left.add("empty files", str(path))
    recorded = (block for block in recording.rows(left) if len(block.experts))
    blocks = (without_gaps(block, kept_columns(block, hints), left) for block in recorded)
    return left, (block for block in blocks if len(block.experts))


def _largest_id(blocks: Iterator[ForeignRows], hints: Hints, progress: "_Progress") -> int:
    largest = 0
    for block in blocks:
        experts = check_rows(progress.passing(block), hints)
        largest = max(largest, int(experts.max()))
    return largest


class _Progress:
    """Tells how many of the files' bytes are done, in one round or two."""

    def __init__(self, paths: Sequence[Path], advance: Advance) -> None:
        self._total = sum(path.stat().st_size for path in paths)
        self._advance = advance
        self._done = 0
        self.rounds = 1

    def passing(self, block: ForeignRows) -> ForeignRows:
        self._done += block.num_bytes
        total = self.rounds * self._total
        self._advance(min(self._done, total), total)
        return block


def _format_of(paths: Sequence[Path], name: str | None) -> ForeignFormat:
    """The format by its name, or the one that all files are of."""
    if name is not None and name not in FORMATS:
        raise InputError(f"format: {name} is not known; choose one of {', '.join(FORMATS)}")
    if name is not None:
        return FORMATS[name]
    starts = [start_of(path) for path in paths]
    names = [_name_of(start) for start in starts]
    if "responses" in names:  # where a request failed, a proxy may have answered in words
        names = [
            name or ("responses" if is_text(start) else None)
            for name, start in zip(names, starts, strict=True)
        ]
    for path, start, other in zip(paths, starts, names, strict=True):
        if other is None:
            raise unknown(path, start, ", ".join(FORMATS))
        if other != names[0]:
            raise InputError(
                f"{path}: is {other}, {paths[0]} is {names[0]}; give files of one recording together"
            )
    return FORMATS[str(names[0])]


def _name_of(start: bytes) -> str | None:
    """The first format that a file's beginning matches."""
    return next((name for name, candidate in FORMATS.items() if candidate.matches(start)), None)
