"""The foreign trace formats by name, and reading files of one of them as a trace."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from exflow.errors import InputError
from exflow.files import atomic_folder
from exflow.profiling.importers.foreign import ForeignRows, Hints, Recording
from exflow.profiling.importers.megatron import open_megatron
from exflow.profiling.importers.npy import open_npy
from exflow.profiling.importers.npz import open_npz
from exflow.profiling.importers.responses import open_responses
from exflow.profiling.importers.sglang import open_sglang
from exflow.profiling.importers.translation import Translation, check_rows
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
    """Whether a file that begins with these bytes is of this format, and how to open files of it."""

    matches: Callable[[bytes], bool]
    open: Callable[[Sequence[Path], Hints], Recording]


def _is_zip(start: bytes) -> bool:
    return start.startswith(b"PK\x03\x04")


def _is_torch(start: bytes) -> bool:
    """Whether an archive's first member is the one that torch.save writes first."""
    length = int.from_bytes(start[26:28], "little")
    return _is_zip(start) and start[30 : 30 + length].endswith(b"/data.pkl")


def _is_json(start: bytes) -> bool:
    return start.lstrip()[:1] in (b"{", b"[")


FORMATS = {
    "sglang": ForeignFormat(_is_torch, open_sglang),
    "npz": ForeignFormat(_is_zip, open_npz),
    "npy": ForeignFormat(lambda start: start.startswith(b"\x93NUMPY"), open_npy),
    "trtllm": ForeignFormat(lambda start: start[8:9] == b"{", open_trtllm),
    "megatron": ForeignFormat(lambda start: _is_json(start) and b'"top_indices"' in start, open_megatron),
    "responses": ForeignFormat(_is_json, open_responses),
}


@dataclass(frozen=True)
class Imported:
    """What was written: the model's routed part, and how much of it."""

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
    rows, layout = concatenate(list(blocks)), translation.layout
    return RoutingTrace.from_arrays(
        rows["experts"],
        sequence=rows["sequence"],
        position=rows["position"],
        phase=rows["phase"],
        weights=rows.get("weights"),
        num_experts=layout.num_experts,
        moe_layer_ids=layout.moe_layer_ids,
        num_hidden_layers=layout.num_hidden_layers,
        experts_per_layer=layout.experts_per_layer,
    )


def import_trace(
    paths: Sequence[Path], output: Path, format: str | None, hints: Hints, advance: Advance
) -> Imported:
    """Write the routing in `paths` as a trace at `output`, block by block, in memory that does not grow.

    As read_trace. A trace at `output` is replaced when the new one is complete: an error leaves it as it was.
    """
    check_replaceable(output)
    translation, blocks = _opened(paths, format, hints, advance)
    tokens, sequences = 0, 0
    with atomic_folder(output) as folder:
        writer = TraceWriter(
            folder, translation.layout, has_weights=translation.has_weights, shard_tokens=_SHARD_TOKENS
        )
        for rows in blocks:
            writer.append(rows)
            tokens += num_rows(rows)
            sequences = max(sequences, int(rows["sequence"].max(initial=-1)) + 1)
        writer.close()
    return Imported(translation.layout, tokens, sequences)


def _opened(
    paths: Sequence[Path], format: str | None, hints: Hints, advance: Advance
) -> tuple[Translation, Iterator[Rows]]:
    """How the files' rows become rows of a trace, and these."""
    if not paths:
        raise InputError("import: no files given; name at least one")
    recording = _format_of(paths, format).open(paths, hints)
    progress = _Progress(paths, advance)
    blocks = _non_empty(recording)
    first = next(blocks, None)
    if first is None:
        raise InputError(f"{paths[0]}: holds no routing of any token; record it again")
    claims = (hints.num_experts, recording.num_experts, first.num_experts)
    number = next((claim for claim in claims if claim is not None), None)
    if number is None:
        progress.rounds = 2
        number = _largest_id(chain([first], blocks), hints, progress) + 1
        _log.warning("the files do not say num_experts: taken as %d, the largest id plus 1", number)
        blocks = _non_empty(recording)
        first = next(blocks)
    translation = Translation.of(first, number, recording, hints)
    return translation, (translation.rows(progress.passing(block)) for block in chain([first], blocks))


def _non_empty(recording: Recording) -> Iterator[ForeignRows]:
    return (block for block in recording.rows() if len(block.experts))


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
    names = [_name_of(path) for path in paths]
    if name is not None:
        return FORMATS[name]
    for path, other in zip(paths, names, strict=True):
        if other is None:
            raise InputError(
                f"{path}: is in no format known here ({', '.join(FORMATS)}); convert it to one of them"
            )
        if other != names[0]:
            raise InputError(
                f"{path}: is {other}, {paths[0]} is {names[0]}; give files of one recording together"
            )
    return FORMATS[str(names[0])]


def _name_of(path: Path) -> str | None:
    """The first format that the file's beginning matches; InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file to import") from error
    return next((name for name, candidate in FORMATS.items() if candidate.matches(start)), None)
