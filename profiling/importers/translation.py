"""Foreign rows as rows of a trace: checked, the MoE layers alone, in the trace's dtypes."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from exflow.errors import InputError
from exflow.profiling.importers.foreign import ForeignRows, Hints, IntArray, Recording
from exflow.profiling.importers.json_values import shown
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.shard import Rows
from exflow.profiling.validate import check_ids, checked_weights


@dataclass(frozen=True, eq=False)
class Translation:
    """The layout that the first rows of a recording settle; later rows must match it."""

    layout: RoutingLayout
    has_weights: bool
    hints: Hints
    first: ForeignRows

    @classmethod
    def of(cls, first: ForeignRows, num_experts: int, recording: Recording, hints: Hints) -> Self:
        """Settle the layout from the first rows; raises InputError, beginning with the file's name, where
        numbers contradict each other."""
        kept = hints.moe_layers or first.layers
        hidden = hints.hidden_layers or first.hidden_layers or max(first.layers) + 1
        if first.hidden_layers not in (None, hidden):
            raise InputError(
                f"{first.path}: has {first.hidden_layers} hidden layers, hidden_layers says {hidden}; "
                "leave it out, or give the files of that model"
            )
        counts = recording.experts_per_layer
        if counts is not None and len(counts) == len(first.layers):
            counts = tuple(counts[column] for column in kept_columns(first, hints))
        try:
            layout = RoutingLayout("", hidden, kept, num_experts, first.experts.shape[2], counts)
        except InputError as error:
            raise InputError(f"{first.path}: {error}") from error
        return cls(layout, recording.has_weights, hints, first)

    def rows(self, block: ForeignRows) -> Rows:
        """The rows of `block`; InputError, beginning with the file's name, where they do not fit."""
        if block.path == self.first.path and block.layers != self.first.layers:
            here, before = shown(list(block.layers)), shown(list(self.first.layers))
            raise InputError(
                f"{block.path}: holds layers {here} after {before}; "
                "record it again, or give moe_layers with those that are always there"
            )
        if (block.layers, block.experts.shape[2]) != (self.first.layers, self.layout.top_k):
            raise InputError(
                f"{block.path}: has {len(block.layers)} layers and top {block.experts.shape[2]}, "
                f"{self.first.path} has {len(self.first.layers)} and {self.layout.top_k}; join files of one "
                "model"
            )
        experts = check_rows(block, self.hints)
        check_ids(f"{block.path}: experts", experts, self.layout)
        rows: Rows = {
            "experts": experts.astype(self.layout.id_dtype),
            "sequence": block.sequence.astype(np.int32),
            "position": block.position.astype(np.int32),
            "phase": block.phase.astype(np.uint8),
        }
        if self.has_weights and block.weights is not None:
            try:
                weights = checked_weights(block.weights, block.experts.shape)
            except InputError as error:
                raise InputError(f"{block.path}: {error}") from error
            rows["weights"] = weights[:, kept_columns(block, self.hints)]
        return rows


def check_rows(block: ForeignRows, hints: Hints) -> IntArray:
    """[tokens, MoE layers, top_k] ids; InputError, beginning with the file's name, for a negative one."""
    columns = kept_columns(block, hints)
    experts = block.experts if len(columns) == len(block.layers) else block.experts[:, columns]
    if experts.min(initial=0) < 0:
        raise InputError(f"{block.path}: experts: holds {experts.min()}; ids start at 0")
    return experts


def kept_columns(block: ForeignRows, hints: Hints) -> list[int]:
    """Columns of the block that hold the kept layers."""
    if hints.moe_layers is None:
        return list(range(len(block.layers)))
    absent = set(hints.moe_layers) - set(block.layers)
    if absent:
        raise InputError(
            f"{block.path}: layer {min(absent)} of moe_layers was not recorded, these were: "
            f"{list(block.layers)}; leave it out"
        )
    return [block.layers.index(layer) for layer in hints.moe_layers]
