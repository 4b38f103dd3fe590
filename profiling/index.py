"""index.json of a trace folder: the metadata and the list of complete shards (docs/trace-format.md)."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from exflow.errors import InputError
from exflow.files import read_json, write_json
from exflow.profiling.layout import RoutingLayout
from exflow.validation import validated

INDEX_NAME = "index.json"
FORMAT, VERSION = "exflow-trace", 1
_REMEDY = "record it again with exflow profile, or import it with exflow import"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Shard(_Strict):
    """One complete shard: its file name inside the folder, and its number of rows."""

    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.safetensors$")]
    num_tokens: Annotated[int, Field(ge=1)]


class TraceIndex(_Strict):
    """The content of index.json; the rows are those of `shards` in this order."""

    format: Literal["exflow-trace"] = "exflow-trace"
    version: Literal[1] = 1
    model: str
    num_hidden_layers: int
    moe_layer_ids: list[int]
    num_experts: int
    experts_per_layer: list[int] | None = None  # written only where the layers differ
    top_k: int
    dtype: Literal["uint8", "uint16"]
    has_weights: bool
    source: str | None = None  # written only where a recording may be gone on with
    shards: list[Shard]

    @classmethod
    def of(
        cls, layout: RoutingLayout, has_weights: bool, shards: list[Shard], source: str | None = None
    ) -> "TraceIndex":
        return cls(
            model=layout.model,
            num_hidden_layers=layout.num_hidden_layers,
            moe_layer_ids=list(layout.moe_layer_ids),
            num_experts=layout.num_experts,
            experts_per_layer=None if layout.experts_per_layer is None else list(layout.experts_per_layer),
            top_k=layout.top_k,
            dtype="uint8" if layout.id_dtype.itemsize == 1 else "uint16",
            has_weights=has_weights,
            source=source,
            shards=shards,
        )

    @property
    def layout(self) -> RoutingLayout:
        """The model's layout; raises InputError where the numbers contradict each other."""
        counts = self.experts_per_layer
        return RoutingLayout(
            model=self.model,
            num_hidden_layers=self.num_hidden_layers,
            moe_layer_ids=tuple(self.moe_layer_ids),
            num_experts=self.num_experts,
            top_k=self.top_k,
            experts_per_layer=None if counts is None else tuple(counts),
        )


def read_index(folder: Path) -> TraceIndex:
    """Read and validate the index of the trace at `folder`; InputError says what is wrong in it."""
    _check_folder(folder)
    path = folder / INDEX_NAME
    raw = read_json(path, "trace index", _REMEDY)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(f'{path}: is not a trace index (no "format": "{FORMAT}"); {_REMEDY}')
    if raw.get("version") != VERSION:
        raise InputError(
            f"{path}: is of trace version {raw.get('version')!r}, this program reads version {VERSION}; "
            f"use the program that wrote it, or {_REMEDY}"
        )
    index = validated(TraceIndex, raw, path, _REMEDY)
    try:
        expected = index.layout.id_dtype.name
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if index.dtype != expected:
        raise InputError(
            f"{path}: dtype: is {index.dtype}, but {index.num_experts} experts take {expected}; {_REMEDY}"
        )
    return index


def write_index(folder: Path, index: TraceIndex) -> None:
    """Publish `index` atomically: from here on readers see exactly its shards."""
    write_json(folder / INDEX_NAME, index.model_dump(exclude_none=True))


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if not folder.exists():
        raise InputError(f"{folder}: no such trace; {_REMEDY}")
    if folder.suffix in (".npz", ".npy"):
        remedy = f"run exflow import {folder} --format {folder.suffix[1:]} -o TRACE"
    else:
        remedy = f"give the folder that holds {INDEX_NAME}, or import the file with exflow import"
    raise InputError(f"{folder}: is a file, and a trace is a folder; {remedy}")
