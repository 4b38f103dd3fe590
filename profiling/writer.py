"""Writing a trace as it streams, so that a stop at any moment leaves a readable trace."""

import re
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from exflow.errors import InputError
from exflow.files import read_json
from exflow.profiling.index import FORMAT, INDEX_NAME, Shard, TraceIndex, read_index, write_index
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.shard import Rows, concatenate, map_shard, num_rows, row_slice, write_shard
from exflow.profiling.validate import check_values

SHARD_TOKENS = 1 << 16
_SHARD_FILE = re.compile(r"shard-(\d+)\.safetensors")
_LEFTOVER = re.compile(r"\.(shard-\d+\.safetensors|index\.json)\..+")  # a temporary file of atomic_path


class TraceWriter:
    """Appends rows to a new trace at `path`; a context manager.

    A shard file appears whole or not at all, and the index is replaced after each shard, so a killed process
    loses at most the last `shard_tokens` rows. An exception inside the `with` block loses nothing: leaving
    the block, however it is left, writes the rows appended so far.

    A trace already at `path` stays readable until the first new shard is complete, and is then replaced:
    new shards take numbers above the old ones, the index moves from the old to the new in one step, and
    files that no index names are removed after it. InputError where `path` holds anything but a trace.

    source: says in the index what is recorded, so that a stopped recording can be gone on with.
    resume: go on with the recording at `path`, if there is one, whose sequences come one after the other.
    `resumed` of them are kept: all but the last, which may be cut short. InputError where it is of another
    source or model.
    """

    def __init__(
        self,
        path: Path,
        layout: RoutingLayout,
        *,
        has_weights: bool,
        shard_tokens: int = SHARD_TOKENS,
        source: str | None = None,
        resume: bool = False,
    ) -> None:
        if shard_tokens < 1:
            raise InputError(f"shard_tokens: is {shard_tokens}; give 1 or more")
        self._folder = path
        self._layout = layout
        self._has_weights = has_weights
        self._shard_tokens = shard_tokens
        self._source = source
        self._has_recorded = False
        self.resumed = 0
        self._shards: list[Shard] = []
        self._pending: list[Rows] = []
        replaces = check_replaceable(path)
        self._next_number = _first_free_number(path)
        if not replaces:
            self._publish()  # from the start the folder is recognisable as a trace
        elif resume:
            self._take_over()

    def append(self, rows: Rows) -> None:
        """Append rows in the dtypes of the format; the arrays must not change until they are written.

        InputError, and nothing appended, where a value is out of range.
        """
        check_values(str(self._folder), rows, self._layout)
        self._has_recorded = True
        start, total = 0, num_rows(rows)
        while start < total:
            stop = min(total, start + self._shard_tokens - self._num_pending)
            self._pending.append(row_slice(rows, start, stop))
            start = stop
            if self._num_pending == self._shard_tokens:
                self._flush()

    def close(self, cut_short: bool = False) -> None:
        """Write the rows that are left; where there are none at all, the folder says so.

        cut_short: by an error. If that came before anything was recorded, what was there stays as it is.
        """
        if cut_short and not (self._has_recorded and (self._pending or self._shards)):
            return
        if self._pending:
            self._flush()
        else:  # also where an error came before the index had the last shard
            self._publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cut_short=error is not None)

    def _take_over(self) -> None:
        """Keep what is recorded already: shards as they are, and rows of the one with the last sequence."""
        index = read_index(self._folder)
        if index != TraceIndex.of(self._layout, self._has_weights, index.shards, self._source):
            raise InputError(
                f"{self._folder}: was recorded from another model or text, or with other settings; set them "
                "back, or record it anew, without resuming"
            )
        blocks = [(shard, map_shard(self._folder, shard, index)) for shard in index.shards]
        self.resumed = int(blocks[-1][1]["sequence"][-1]) if blocks else 0
        for shard, rows in blocks:
            kept = int(np.searchsorted(rows["sequence"], self.resumed))
            if kept == shard.num_tokens:
                self._shards.append(shard)
            elif kept:
                self.append({name: array.copy() for name, array in row_slice(rows, 0, kept).items()})
        self._has_recorded = False

    @property
    def _num_pending(self) -> int:
        return sum(map(num_rows, self._pending))

    def _flush(self) -> None:
        shard = Shard(file=f"shard-{self._next_number:05d}.safetensors", num_tokens=self._num_pending)
        write_shard(self._folder / shard.file, concatenate(self._pending))
        self._next_number += 1
        # without a call between: a signal's exception finds the rows in one place, not in two
        self._pending, self._shards = [], [*self._shards, shard]
        self._publish()

    def _publish(self) -> None:
        write_index(self._folder, TraceIndex.of(self._layout, self._has_weights, self._shards, self._source))
        listed = {shard.file for shard in self._shards}
        for file in self._folder.iterdir():
            stale = _SHARD_FILE.fullmatch(file.name) and file.name not in listed
            if stale or _LEFTOVER.fullmatch(file.name):
                file.unlink(missing_ok=True)


def check_replaceable(folder: Path) -> bool:
    """True if `folder` holds a trace, False if it is absent or empty; InputError for anything else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file, and a trace is a folder; choose another place")
    if not any(folder.iterdir()):
        return False
    remedy = "choose another place, or remove it"
    if not (folder / INDEX_NAME).is_file():
        raise InputError(f"{folder}: is a folder that holds something other than a trace; {remedy}")
    index = read_json(folder / INDEX_NAME, "trace index", remedy)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{folder}: is a folder that holds something other than a trace; {remedy}")
    return True


def _first_free_number(folder: Path) -> int:
    names = [_SHARD_FILE.fullmatch(file.name) for file in folder.iterdir()] if folder.exists() else []
    return max((int(name[1]) + 1 for name in names if name), default=0)
