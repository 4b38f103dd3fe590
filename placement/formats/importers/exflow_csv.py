"""The original ExFlow's solution file (see exporters/exflow_csv.py)."""

import csv
import io
import re
import reprlib

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.formats.exporters.sidecar import ModelShape
from exflow.placement.formats.importers.foreign import ForeignMap, decoded

_NUMBER = re.compile(r"[0-9]{1,9}")


def read_exflow(content: bytes, model: ModelShape) -> ForeignMap:
    """Each GPU's experts in ascending order, since the file holds no order of slots. Rows may be in any
    order.

    Raises InputError if the layers of the model have different numbers of experts: ids are layer * E + e.
    """
    if min(model.experts_per_layer) != model.num_experts:
        raise InputError(
            "numbers the experts of all layers alike, the model's layers differ; use another format"
        )
    rank = _ranks(decoded(content), model.num_layers * model.num_experts)
    rank_of_expert = rank.reshape(model.num_layers, model.num_experts)
    num_ranks = int(rank.max()) + 1
    for layer, row in enumerate(rank_of_expert):
        for each, share in enumerate(np.bincount(row, minlength=num_ranks).tolist()):
            if share * num_ranks != model.num_experts:
                raise InputError(
                    f"MoE layer {layer}: node {each} of {num_ranks} has {share} of {model.num_experts} "
                    "experts, in a plan every GPU has as many; level the file, or place again"
                )
    return ForeignMap(np.argsort(rank_of_expert, axis=1, kind="stable"), num_ranks)


def is_exflow(content: bytes) -> bool:
    return re.match(rb"Expert,Node\r?\n", content) is not None


def _ranks(text: str, num_items: int) -> npt.NDArray[np.int64]:
    """[num_items]: the GPU of each, every one given once."""
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""))
    except (csv.Error, ValueError) as error:
        raise InputError(f"is no CSV file ({error}); give one with the columns Expert,Node") from error
    if header != ["Expert", "Node"]:
        raise InputError(f"line 1: is {reprlib.repr(header)}; give the columns Expert,Node")
    rank = np.full(num_items, -1, dtype=np.int64)
    for line, row in enumerate(rows, start=2):
        if len(row) != 2 or not all(_NUMBER.fullmatch(field) for field in row):
            raise InputError(f"line {line}: is {reprlib.repr(row)}; give two numbers from 0 up")
        item, node = map(int, row)
        if item >= num_items or rank[item] >= 0 or node >= num_items:
            raise InputError(
                f"line {line}: places expert {item} on {node}; the model has {num_items} experts in all, "
                "place each once, on GPUs from 0 up"
            )
        rank[item] = node
    if (rank < 0).any():
        raise InputError(
            f"does not place expert {int(np.argmax(rank < 0))} of 0..{num_items - 1}; give the file whole"
        )
    return rank
