"""SGLang's expert distribution recorder in mode per_token: expert_distribution_recorder_*_RANK.pt.

sglang 0.5.23, srt/eplb/expert_distribution.py. Each rank's file is

    {"records": [record of a forward pass, ...], "last_physical_to_logical_map": [H, P]}
    record: "forward_pass_id", "positions" [T], "extend_seq_lens", "forward_mode",
            "topk_ids_of_layer" int32 [H, T, 8], ...

The ids are of slots, -1 past the model's top_k, in dense layers and in padding. Requests have no names.

Shapes: H hidden layers, T tokens of a pass, P slots of a layer, k choices.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.importers.dense import Routed, RoutedLayers
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording
from exflow.profiling.importers.json_values import shown
from exflow.profiling.importers.left_out import LeftOut
from exflow.profiling.importers.passes import SeenPasses
from exflow.profiling.importers.requests import RequestTracker
from exflow.profiling.importers.torch_file import let_go, load_torch
from exflow.profiling.trace import DECODE, PREFILL

Mask = npt.NDArray[np.bool_]

_REMEDY = "give the .pt files that SGLang's recorder dumped"
_AGAIN = "record with --expert-distribution-recorder-mode per_token, or import per-request routed_experts"
_RANK = re.compile(r".*_(\d+)\.pt")
_EXTEND, _DECODE, _MIXED = 1, 2, 3  # srt/model_executor/forward_batch_info.py, ForwardMode
_CHUNK = 1 << 13  # tokens translated at a time


def open_sglang(paths: Sequence[Path], hints: Hints) -> Recording:
    """The ranks' files of one recording, of one dump or several; what several ranks recorded counts once.

    Tensor-parallel ranks record the same tokens, data-parallel ones their own. Raises InputError for a
    damaged file, for one of another mode (loads say nothing of affinity), and where the layers of a pass
    disagree.
    """
    ordered = sorted(paths, key=_rank)  # rank 0's rows are right even where a gathered batch was cut
    return Recording(lambda left: _rows(ordered, hints, left))


def _rows(paths: Sequence[Path], hints: Hints, left: LeftOut) -> Iterator[ForeignRows]:
    seen, routed = SeenPasses(len(paths)), RoutedLayers(hints.moe_layers, left)
    numbers = itertools.count()
    trackers: dict[int, RequestTracker] = {}
    for path in paths:
        dump = _load(path)
        slots_HP = _slots(path, dump)
        tracker = trackers.setdefault(_rank(path), RequestTracker(numbers))
        for index, record in enumerate(dump["records"]):
            where = f"{path}: records[{index}]"
            ids_HTK = _recorded_ids(where, record, slots_HP)
            choices_TH = np.count_nonzero(ids_HTK >= 0, axis=2).T
            top_k = int(choices_TH.max(initial=0))
            split = routed.split(path, choices_TH > 0, choices_TH < top_k)
            experts = _logical(where, ids_HTK, slots_HP, split, top_k)
            let_go(ids_HTK)
            if not choices_TH.any() or seen.is_repeated(record["forward_pass_id"], experts):
                continue
            sequence, position, phase = _places(where, record, choices_TH.any(axis=1), split.whole, tracker)
            yield ForeignRows(
                path=path,
                layers=split.layers,
                experts=experts,
                sequence=sequence,
                position=position,
                phase=phase,
                hidden_layers=len(slots_HP),
                num_experts=int(slots_HP.max()) + 1,
                num_bytes=ids_HTK.nbytes,
            )


def _load(path: Path) -> dict[str, Any]:
    dump = load_torch(path, _REMEDY)
    if isinstance(dump, dict) and "logical_count" in dump:
        raise InputError(
            f"{path}: holds loads (mode stat), which say nothing of affinity between layers; "
            f"place by them alone with exflow balance, or {_AGAIN}"
        )
    if not isinstance(dump, dict) or not isinstance(dump.get("records"), list):
        raise InputError(f"{path}: holds {shown(dump)}, no records; {_REMEDY}")
    if "last_physical_to_logical_map" not in dump:
        raise InputError(f"{path}: has no last_physical_to_logical_map; {_REMEDY}")
    return dump


def _slots(path: Path, dump: dict[str, Any]) -> IntArray:
    """[H, P]: the expert in each slot, dense layers included."""
    where = f"{path}: last_physical_to_logical_map"
    slots = _tensor(where, dump["last_physical_to_logical_map"], 2)
    if not slots.size or slots.min() < 0 or slots.max() >= 1 << 16:
        raise InputError(f"{where}: holds no expert ids; {_REMEDY}")
    return slots


def _recorded_ids(where: str, record: Any, slots_HP: IntArray) -> IntArray:
    """[H, T, 8] ids of slots."""
    if not isinstance(record, dict) or "global_physical_count" not in record:
        raise InputError(f"{where}: is {shown(record)}; {_REMEDY}")
    if type(record.get("forward_pass_id")) is not int:
        raise InputError(
            f"{where}: forward_pass_id: is {shown(record.get('forward_pass_id'))}, no number; {_REMEDY}"
        )
    if "topk_ids_of_layer" not in record:
        raise InputError(f"{where}: holds loads (mode per_pass), which say nothing of affinity; {_AGAIN}")
    ids = _tensor(f"{where}.topk_ids_of_layer", record["topk_ids_of_layer"], 3)
    if len(ids) != len(slots_HP):
        raise InputError(
            f"{where}: topk_ids_of_layer: has {len(ids)} layers, "
            f"last_physical_to_logical_map {len(slots_HP)}; {_REMEDY}"
        )
    return ids


def _tensor(where: str, value: Any, dims: int) -> IntArray:
    """A tensor of integers as an array; one that repeats its storage is refused: it may be of any size."""
    import torch

    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.dtype not in (torch.int32, torch.int64)
        or value.dim() != dims
        or not value.is_contiguous()
    ):
        raise InputError(f"{where}: is {shown(value)}; a tensor of integers in {dims} dimensions is needed")
    return value.numpy()


def _logical(where: str, ids_HTK: IntArray, slots_HP: IntArray, split: Routed, top_k: int) -> IntArray:
    """[whole tokens, layers, k]: the experts in the slots."""
    if ids_HTK.max(initial=-1) >= slots_HP.shape[1]:
        raise InputError(
            f"{where}: topk_ids_of_layer: holds slot {ids_HTK.max()} of {slots_HP.shape[1]}; record with "
            "--disable-shared-experts-fusion"
        )
    tokens, chosen = np.flatnonzero(split.whole), split.columns
    slots = slots_HP[chosen].astype(np.uint16)
    parts = []
    for start in range(0, len(tokens), _CHUNK):
        ids_TLK = ids_HTK[chosen][:, tokens[start : start + _CHUNK]].transpose(1, 0, 2)
        if (ids_TLK[..., :top_k] < 0).any():
            raise InputError(
                f"{where}: topk_ids_of_layer: has -1 among the first {top_k} ids of a token; {_REMEDY}"
            )
        parts.append(slots[np.arange(len(chosen))[:, None], ids_TLK[..., :top_k]])
    return np.concatenate(parts) if parts else np.empty((0, len(chosen), 1), np.uint16)


def _places(
    where: str, record: dict[str, Any], captured: Mask, whole: Mask, tracker: RequestTracker
) -> tuple[IntArray, IntArray, IntArray]:
    """Sequence, position and phase of the whole tokens; requests are followed by all that were captured."""
    position = _positions(where, record, len(captured))
    pieces, phase = _pieces(where, record, position, captured)
    lengths = [length for _, length in pieces]
    rows = np.concatenate([np.arange(0), *(np.arange(at, at + length) for at, length in pieces)])
    if not np.isin(np.flatnonzero(captured), rows).all():
        raise InputError(f"{where}: extend_seq_lens: leave out tokens that were routed; {_REMEDY}")
    names = tracker.follow([(int(position[at]), length) for at, length in pieces])
    kept = whole[rows]
    return np.repeat(names, lengths)[kept], position[whole], np.repeat(phase, lengths)[kept]


def _positions(where: str, record: dict[str, Any], tokens: int) -> IntArray:
    """[T] int32."""
    value = record.get("positions")
    try:
        position = np.array(value)
    except ValueError:  # lists of different lengths
        position = np.empty(0)
    if position.shape != (tokens,) or position.dtype.kind != "i":
        raise InputError(f"{where}: positions: is {shown(value)}; {tokens} integers are needed; {_REMEDY}")
    if position.min() < 0 or position.max() >= 1 << 31:
        raise InputError(f"{where}: positions: holds {position.min()} to {position.max()}; {_REMEDY}")
    return position.astype(np.int32)


def _pieces(
    where: str, record: dict[str, Any], position: IntArray, captured: Mask
) -> tuple[list[tuple[int, int]], list[int]]:
    """First row and number of rows of each request's piece, and its phase.

    A pass of mode MIXED decodes some requests, one token each, among those it extends.
    """
    mode, lengths = record.get("forward_mode"), record.get("extend_seq_lens")
    if mode not in (_EXTEND, _DECODE, _MIXED):
        raise InputError(
            f"{where}: forward_mode: is {shown(mode)}, not extend, decode or mixed; "
            "record without speculative decoding"
        )
    if mode == _DECODE:
        rows = np.flatnonzero(captured).tolist()
        return [(row, 1) for row in rows], [DECODE] * len(rows)
    if not isinstance(lengths, list) or not all(type(n) is int and 0 <= n <= len(position) for n in lengths):
        raise InputError(f"{where}: extend_seq_lens: is {shown(lengths)}; {_REMEDY}")
    starts = np.cumsum([0, *lengths]).tolist()
    if starts[-1] > len(position):
        raise InputError(
            f"{where}: extend_seq_lens: are {starts[-1]} tokens in all, the pass has {len(position)}; "
            f"{_REMEDY}"
        )
    pieces = [(at, n) for at, n in zip(starts, lengths, strict=False) if n and captured[at : at + n].any()]
    for at, n in pieces:
        if (np.diff(position[at : at + n]) != 1).any():
            raise InputError(f"{where}: positions: do not ascend by 1 in a request; {_REMEDY}")
    return pieces, [DECODE if mode == _MIXED and n == 1 else PREFILL for _, n in pieces]


def _rank(path: Path) -> int:
    found = _RANK.fullmatch(path.name)
    return int(found[1]) if found else -1
