"""TensorRT-LLM's raw expert statistics: rank*_raw.safetensors, beside meta_info.json.

Written by tensorrt_llm/_torch/expert_statistic.py in the versions that have the raw form, read by
examples/wide_ep/ep_load_balancer/utils.py (load_raw_expert_statistic). Key "{iteration}_{layer}" ->
token_selected_experts [tokens, top_k]. With a load balancer the ids are those of slots
(fused_moe_wide_ep.py), and num_experts in meta_info.json is the number of slots: record without one.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from exflow.errors import InputError
from exflow.files import read_json
from exflow.profiling.importers.agreement import agreed
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording
from exflow.profiling.importers.passes import RowSequences, SeenPasses
from exflow.profiling.importers.safetensors_file import TensorPlace, tensor_places

_REMEDY = "give the rank*_raw.safetensors that TensorRT-LLM wrote"
_KEY = re.compile(r"(\d{1,9})_(\d{1,9})")
_RANK = re.compile(r"rank(\d+)_raw\.safetensors")


def open_trtllm(paths: Sequence[Path], hints: Hints) -> Recording:
    """The ranks' files of one recording; tokens that several ranks recorded count once.

    The files know no requests: see RowSequences. Raises InputError for a damaged file, for counts instead of
    ids (rank*.safetensors), and where the layers of an iteration hold different numbers of tokens.
    """
    ordered = sorted(paths, key=_rank)
    return Recording(
        lambda _: _rows(ordered, hints),
        num_experts=agreed("num_experts", {path: _num_experts(path) for path in paths}),
    )


def _rows(paths: Sequence[Path], hints: Hints) -> Iterator[ForeignRows]:
    seen, sequences = SeenPasses(len(paths)), RowSequences()
    for path in paths:
        iterations = _iterations(path, hints.moe_layers)
        with path.open("rb") as file:
            for iteration, layers in sorted(iterations.items()):
                _check_shapes(path, iteration, layers)
                ids: list[IntArray] = [layers[layer].read(file) for layer in sorted(layers)]
                experts = np.stack(ids, axis=1)
                if seen.is_repeated(iteration, experts):
                    continue
                yield sequences.rows(path, layers, experts, experts.nbytes)


def _iterations(path: Path, kept: tuple[int, ...] | None) -> dict[int, dict[int, TensorPlace]]:
    """Iteration -> layer (only those that are kept) -> where its ids are."""
    iterations: dict[int, dict[int, TensorPlace]] = {}
    for name, place in tensor_places(path, _REMEDY).items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise InputError(f"{path}: holds {name[:40]!r}, not iteration_layer; {_REMEDY}")
        if kept is None or int(key[2]) in kept:
            iterations.setdefault(int(key[1]), {})[int(key[2])] = place
    return iterations


def _check_shapes(path: Path, iteration: int, layers: dict[int, TensorPlace]) -> None:
    first = min(layers)
    for layer, place in layers.items():
        if len(place.shape) != 2 or not place.shape[1]:
            raise InputError(
                f"{path}: {iteration}_{layer}: has the shape {list(place.shape)}, ids have [tokens, top_k] "
                "(rank*.safetensors without _raw holds counts, which say nothing of affinity); "
                f"{_REMEDY}"
            )
        if place.shape != layers[first].shape:
            raise InputError(
                f"{path}: iteration {iteration} has {list(place.shape)} ids in layer {layer} and "
                f"{list(layers[first].shape)} in layer {first}; "
                "leave layers out with moe_layers, or record it again"
            )


def _num_experts(path: Path) -> int | None:
    """The number of experts by meta_info.json in the same folder; None without that file."""
    meta = path.with_name("meta_info.json")
    if not meta.exists():
        return None
    content = read_json(meta, "meta_info.json", "restore it, or remove it and give num_experts")
    number = content.get("num_experts") if isinstance(content, dict) else None
    if type(number) is not int:
        raise InputError(f"{meta}: num_experts: is {number!r}; give an integer, or remove the file")
    return number


def _rank(path: Path) -> int:
    found = _RANK.fullmatch(path.name)
    return int(found[1]) if found else -1
