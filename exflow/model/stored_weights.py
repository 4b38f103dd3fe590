"""Stored weights of a checkpoint folder: `model.safetensors`, or shards and an index."""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exflow.errors import InputError
from exflow.files import read_json
from exflow.model.config_file import REMEDY
from exflow.model.families.layout import LEFT_OVER, Piece, Stored

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")  # a plain name, without a path to another folder
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # dtypes of unquantised weights
PACKED = (torch.uint8,)  # dtypes of quantised weights


@dataclass(frozen=True)
class StoredWeights:
    """The opened weights of a checkpoint. file_of: path and open file of each tensor, by name."""

    folder: Path
    file_of: dict[str, tuple[Path, Any]]

    @classmethod
    def of(cls, folder: Path, stack: ExitStack) -> Self:
        """Open the weights in `folder`; `stack` closes the files."""
        opened = [(path, stack.enter_context(_open(path))) for path in _weight_files(folder)]
        names = {name: (path, file) for path, file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
        return cls(folder, names)

    def alike(self, one: str, other: str) -> bool:
        """True if two tensors have equal values, whatever their dtypes."""
        first, second = (self.file_of[name][1].get_tensor(name) for name in (one, other))
        return first.shape == second.shape and bool((first.float() == second.float()).all())

    def check_names(self, wanted: set[str], copies: set[str]) -> None:
        """Raise InputError for missing weights, and for others that are neither copies nor left-overs."""
        if missing := wanted - self.file_of.keys():
            raise InputError(f"{self.folder}: the weights '{min(missing)}' are missing; {REMEDY}")
        spare = self.file_of.keys() - wanted - copies
        if unknown := {name for name in spare if not LEFT_OVER.fullmatch(name)}:
            name = min(unknown)
            raise InputError(f"{self.file_of[name][0]}: config.json implies no weights '{name}'; {REMEDY}")

    def full_precision(self) -> bool:
        """True if all tensors are float32 or float64."""
        return all(
            file.get_slice(name).get_dtype() in ("F32", "F64") for name, (_, file) in self.file_of.items()
        )

    def read(self, piece: Piece) -> Tensor:
        return piece.join([self._read(part) for part in piece.parts])

    def _read(self, part: Stored) -> Tensor:
        path, file = self.file_of[part.name]
        stored = file.get_slice(part.name)
        if (found := stored.get_shape()) != list(part.shape):
            raise InputError(
                f"{path}: '{part.name}' has shape {found}, config.json implies {list(part.shape)}; {REMEDY}"
            )
        value: Tensor = file.get_tensor(part.name) if part.row is None else stored[part.row : part.row + 1][0]
        if value.dtype not in (PACKED if part.packed else PLAIN):
            kind = str(value.dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: '{part.name}' is stored as {kind}, which config.json does not explain; give "
                "weights in bfloat16, float16 or float32"
            )
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: the weights '{part.name}' hold NaN or infinite values; {REMEDY}")
        return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    path = folder / INDEX
    index = read_json(path, "weights", f"a checkpoint has {WEIGHTS}, or shards and {INDEX}")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    files = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and _SHARD.fullmatch(file) for file in files):  # beside the index
        raise InputError(f"{path}: the key 'weight_map' does not name a file for each tensor; {REMEDY}")
    return [folder / file for file in sorted(set(files))]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such weights; {REMEDY}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read, truncated? ({error}); {REMEDY}") from error
