"""Writes the renumbered copy of a Hugging Face checkpoint, shard by shard.

All headers are read and checked before the first byte is written. The folder appears when it is whole.
"""

import errno
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from exflow.encodings import utf8_text
from exflow.errors import InputError
from exflow.files import atomic_folder, check_writable, read_json, unique_keys, write_json
from exflow.placement.formats.renumber.permute import (
    Change,
    Orders,
    change_of,
    check_groups,
    check_layers,
    orders_of,
)
from exflow.placement.formats.renumber.settings import (
    CONFIG,
    FILES_OF_NAMES,
    check_num_layers,
    read_config,
    routing_groups,
    with_new_names,
)
from exflow.placement.formats.renumber.shards import REMEDY, Shard, Tensor
from exflow.placement.formats.renumber.tensors import Kind, Role, role_of
from exflow.placement.plan.plan import Plan

PLACEMENT = "exflow-placement.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")  # no path to another folder
# Copies of the weights in other forms: their experts have the old numbers, so they stay behind.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")

Progress = Callable[[int, int], None]
"""Called with the bytes of weights written so far, and those of the whole checkpoint."""


@dataclass(frozen=True)
class Renumbered:
    """Result of renumbering. draft: tensors of multi-token prediction, which are as they were.

    left_out: files of the model that are not in the copy, since they hold weights in another form.
    """

    num_tensors: int
    num_renamed: int
    num_permuted: int
    draft: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint whose files have been read and fit the plan. index: None for a single file."""

    folder: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    changes: dict[str, Change]
    draft: tuple[str, ...]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, plan: Plan) -> Self:
        if (folder / PLACEMENT).exists():
            raise InputError(f"{folder / PLACEMENT}: the checkpoint is renumbered already; give the original")
        orders = orders_of(plan)
        config = read_config(folder)
        check_num_layers(folder / CONFIG, config, plan.num_hidden_layers)
        index = None if (folder / WEIGHTS).is_file() else _read_index(folder / INDEX)
        files = [WEIGHTS] if index is None else sorted(set(index["weight_map"].values()))
        shards = tuple(Shard.read(folder / file) for file in files)
        tensors = _tensors(shards)
        if index is not None:
            _check_index(folder / INDEX, index["weight_map"], shards)
        roles = {name: role_of(name, plan.num_hidden_layers) for name in tensors}
        _check_roles(folder, roles, orders)
        if (groups := routing_groups(config)) > 1:
            _check_groups(folder, groups, orders)
        changes = {name: change_of(name, roles[name], one.shape, orders) for name, one in tensors.items()}
        settings = _settings(folder, plan.num_hidden_layers, orders)
        draft = tuple(name for name, role in roles.items() if role.kind == Kind.DRAFT)
        return cls(folder, shards, index, changes, draft, settings)

    @property
    def num_bytes(self) -> int:
        return sum(one.end - one.begin for shard in self.shards for one in shard.tensors)

    def changed(self, shard: Shard) -> bool:
        return any(self.changes[one.name] != Change(one.name) for one in shard.tensors)

    def new_index(self) -> dict[str, Any]:
        assert self.index is not None
        weight_map = {self.changes[name].name: file for name, file in self.index["weight_map"].items()}
        return self.index | {"weight_map": dict(sorted(weight_map.items()))}


def renumber(
    model: Path, plan: Plan, output: Path, *, link: bool = False, progress: Progress | None = None
) -> Renumbered:
    """Write a copy of the checkpoint `model` to `output`, in which contiguous expert parallelism is `plan`.

    link: files without a change become hard links. Raises InputError if the plan or the checkpoint does not
    allow it, or `output` cannot be written; nothing is left behind then.
    """
    _check_output(model, output)
    checkpoint = _Checkpoint.read(model, plan)
    kept, left_out = _other_files(model, {shard.path.name for shard in checkpoint.shards})
    count = _Count(checkpoint.num_bytes, progress)
    with atomic_folder(output) as staging:
        for shard in checkpoint.shards:
            target = staging / shard.path.name
            if checkpoint.changed(shard):
                shard.write(target, checkpoint.changes, count.add)
            else:
                _copy(shard.path, target, link)
                count.add(sum(one.end - one.begin for one in shard.tensors))
        for file in kept:
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            if file not in checkpoint.settings:
                _copy(model / file, staging / file, link)
        for file, content in checkpoint.settings.items():
            write_json(staging / file, content)
        if checkpoint.index is not None:
            write_json(staging / INDEX, checkpoint.new_index())
        _write_placement(staging / PLACEMENT, plan)
    changes = checkpoint.changes.items()
    return Renumbered(
        num_tensors=len(checkpoint.changes),
        num_renamed=sum(change.name != name for name, change in changes),
        num_permuted=sum(change.rows is not None for _, change in changes),
        draft=checkpoint.draft,
        left_out=tuple(left_out),
    )


@dataclass
class _Count:
    total: int
    progress: Progress | None
    done: int = 0

    def add(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)


def _check_output(model: Path, output: Path) -> None:
    ours, theirs = output.resolve(), model.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise InputError(
            f"{output}: is the checkpoint itself, or one is inside the other; choose another place"
        )
    empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not empty and not (output / PLACEMENT).is_file():
        raise InputError(
            f"{output}: is something other than a renumbered checkpoint; choose another place or remove it"
        )
    check_writable(output)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(utf8_text(path.read_bytes()), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such weights; give a checkpoint with {WEIGHTS}, or shards and {INDEX}"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the index is damaged ({error}); {REMEDY}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    files = weight_map.values() if isinstance(weight_map, dict) and weight_map else [None]
    if not all(isinstance(file, str) and _PLAIN_NAME.fullmatch(file) for file in files):  # beside the index
        raise InputError(f"{path}: the key 'weight_map' does not name a file for each tensor; {REMEDY}")
    assert isinstance(index, dict)
    return index


def _tensors(shards: tuple[Shard, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    file_of: dict[str, Path] = {}
    for shard in shards:
        for one in shard.tensors:
            if one.name in tensors:
                raise InputError(f"{shard.path}: '{one.name}' is in {file_of[one.name].name} too; {REMEDY}")
            tensors[one.name], file_of[one.name] = one, shard.path
    return tensors


def _check_index(path: Path, weight_map: dict[str, str], shards: tuple[Shard, ...]) -> None:
    names = {shard.path.name: {one.name for one in shard.tensors} for shard in shards}
    for name, file in weight_map.items():
        if name not in names[file]:
            raise InputError(f"{path}: names '{name}' in {file}, which lacks it; {REMEDY}")


def _check_roles(folder: Path, roles: dict[str, Role], orders: Orders) -> None:
    """Raise InputError unless the tensors are those of the plan's model."""
    routed = (Kind.OWN, Kind.STACKED, Kind.ROUTER)
    if len(stacks := sorted({role.stack for role in roles.values() if role.kind in routed})) > 1:
        raise InputError(
            f"{folder}: '{stacks[0]}layers' and '{stacks[1]}layers' both have experts, and a plan is for one "
            "model; give a checkpoint of the language model alone"
        )
    found: defaultdict[int, set[int]] = defaultdict(set)
    with_router = set()
    for role in roles.values():
        if role.layer is not None and role.kind == Kind.ROUTER:
            with_router.add(role.layer)
        elif role.layer is not None and role.kind in routed:
            found[role.layer] |= set() if role.expert is None else {role.expert}
    check_layers(found, with_router, orders, folder)


def _check_groups(folder: Path, groups: int, orders: Orders) -> None:
    try:
        check_groups(groups, orders)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error


def _settings(folder: Path, num_hidden_layers: int, orders: Orders) -> dict[str, Any]:
    """The new content of those settings files in which names of experts change."""
    changed = {}
    for file in FILES_OF_NAMES:
        if (folder / file).is_file():
            content = read_json(folder / file, "settings", REMEDY)
            new = with_new_names(folder / file, content, num_hidden_layers, orders)
            if new != content:
                changed[file] = new
    return changed


def _other_files(folder: Path, shards: set[str]) -> tuple[list[str], list[str]]:
    """The files beside the weights, and those that stay behind; hidden ones are neither."""
    kept: list[str] = []
    left_out: list[str] = []
    for file in sorted(_visible_files(folder)):
        if file in shards or file == INDEX:
            continue
        other = file.endswith((*_OTHER_WEIGHTS, ".safetensors.index.json", ".bin.index.json"))
        (left_out if other else kept).append(file)
    return kept, left_out


def _visible_files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield str(relative)


def _copy(source: Path, target: Path, link: bool) -> None:
    """Copy or link a file; of a symbolic link, the file that it leads to."""
    if not link:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        raise InputError(
            f"{source}: no hard link to it can be made ({error.strerror}); copy the files instead, or choose "
            "a place on the same file system"
        ) from error


def _write_placement(path: Path, plan: Plan) -> None:
    """Write the plan, and for each MoE layer the old id of each new expert."""
    old_ids = {str(layer): list(order) for layer, order in orders_of(plan).items()}
    document = plan.document().model_dump()
    write_json(path, {"format": "exflow-renumbered", "version": 1, "old_ids": old_ids, "plan": document})
