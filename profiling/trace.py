"""RoutingTrace: which experts each token visited, the one input of placement (docs/trace-format.md)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.index import read_index
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.shard import Rows, concatenate, joined_in_a_file, map_shard
from exflow.profiling.validate import (
    check_ids,
    check_order,
    check_values,
    checked_integers,
    checked_weights,
    count_up,
)
from exflow.profiling.writer import TraceWriter

PREFILL, DECODE = 0, 1

_CHUNK_TOKENS = 1 << 16  # rows hashed at a time, so that a mapped trace is not copied into memory
MOST_IN_MEMORY = 256 << 20  # bytes of a trace of several shards that are joined in memory


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of `num_tokens` tokens; compare two traces by `digest`.

    experts   [tokens, moe_layers, top_k] uint8 (up to 256 experts) or uint16: logical ids, first choice first
    sequence  [tokens] int32: which sequence the token belongs to; its home rank is this modulo the ranks
    position  [tokens] int32: the token's place in its sequence
    phase     [tokens] uint8: PREFILL or DECODE
    weights   [tokens, moe_layers, top_k] float16: the gate's weights, or None where not recorded

    `experts_per_layer` [moe_layers] says how many experts each layer has, by default `num_experts`, the most.
    Rows of one sequence are in order of position; rows of different sequences may interleave.
    `from_arrays` and `load` validate; the plain constructor trusts its caller.
    """

    experts: npt.NDArray[np.uint8 | np.uint16]
    sequence: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float16] | None
    num_experts: int
    moe_layer_ids: tuple[int, ...]
    num_hidden_layers: int
    model: str
    experts_per_layer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.experts_per_layer:
            object.__setattr__(self, "experts_per_layer", (self.num_experts,) * self.num_layers)

    @property
    def num_tokens(self) -> int:
        return len(self.experts)

    @property
    def num_layers(self) -> int:
        """The number of MoE layers."""
        return len(self.moe_layer_ids)

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    @property
    def layout(self) -> RoutingLayout:
        return RoutingLayout(
            self.model,
            self.num_hidden_layers,
            self.moe_layer_ids,
            self.num_experts,
            self.top_k,
            self.experts_per_layer,
        )

    @classmethod
    def from_arrays(
        cls,
        experts: npt.ArrayLike,
        *,
        num_experts: int,
        sequence: npt.ArrayLike | None = None,
        position: npt.ArrayLike | None = None,
        phase: npt.ArrayLike | None = None,
        weights: npt.ArrayLike | None = None,
        model: str = "",
        moe_layer_ids: Sequence[int] | None = None,
        num_hidden_layers: int | None = None,
        experts_per_layer: Sequence[int] | None = None,
    ) -> Self:
        """A validated trace of `experts`, integers [tokens, layers, top_k], or [tokens, layers] for top-1.

        `sequence` defaults to all 0, `position` to 0, 1, ... within each sequence, `phase` to DECODE,
        `moe_layer_ids` to 0..layers-1, `num_hidden_layers` to the last of them plus 1, `experts_per_layer` to
        `num_experts` in each. `weights` has the shape of `experts`. Raises InputError where a shape, a dtype
        or a value does not fit.
        """
        ids = _with_choices(experts)
        if ids.ndim != 3 or 0 in ids.shape[1:]:
            raise InputError(
                f"experts: shape is {ids.shape}; give [tokens, layers, top_k] or [tokens, layers]"
            )
        tokens, layers, top_k = ids.shape
        layer_ids = tuple(range(layers) if moe_layer_ids is None else (int(i) for i in moe_layer_ids))
        if len(layer_ids) != layers:
            raise InputError(
                f"moe_layer_ids: has {len(layer_ids)} entries for {layers} layers; give one each"
            )
        hidden = max(layer_ids) + 1 if num_hidden_layers is None else num_hidden_layers
        counts = None if experts_per_layer is None else tuple(int(count) for count in experts_per_layer)
        layout = RoutingLayout(model, int(hidden), layer_ids, int(num_experts), top_k, counts)

        row = (tokens,)
        sequence = np.zeros(row, np.int32) if sequence is None else sequence
        sequence = checked_integers("sequence", sequence, np.int32, row)
        position = count_up(sequence) if position is None else position
        phase = np.full(row, DECODE, np.uint8) if phase is None else phase
        rows: Rows = {
            "experts": checked_integers("experts", ids, layout.id_dtype, ids.shape, num_experts),
            "sequence": sequence,
            "position": checked_integers("position", position, np.int32, row),
            "phase": checked_integers("phase", phase, np.uint8, row, 2),
        }
        if weights is not None:
            rows["weights"] = checked_weights(_with_choices(weights), ids.shape)
        check_ids("experts", rows["experts"], layout)
        check_order("position", sequence, rows["position"])
        return cls._of(rows, layout)

    @classmethod
    def from_rows(cls, rows: Rows, layout: RoutingLayout) -> Self:
        """A validated trace of `rows`, of a model with this layout (see `from_arrays`)."""
        fields: dict[str, Any] = {**rows, **asdict(layout)}
        del fields["top_k"]  # the shape of experts says it
        return cls.from_arrays(**fields)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open the trace folder at `path`, memory-mapped.

        Several shards are joined: in memory up to MOST_IN_MEMORY bytes, else in a temporary file (TMPDIR).
        Raises InputError naming the file where anything is missing, damaged or contradicts the index.
        """
        folder = Path(path)
        index = read_index(folder)
        if not index.shards:
            raise InputError(f"{folder}: the trace holds no tokens; record it again")
        blocks = []
        for shard in index.shards:
            block = map_shard(folder, shard, index)
            check_values(str(folder / shard.file), block, index.layout)
            blocks.append(block)
        size = sum(array.nbytes for block in blocks for array in block.values())
        join = concatenate if len(blocks) == 1 or size <= MOST_IN_MEMORY else joined_in_a_file
        rows = join(blocks)
        check_order(str(folder), rows["sequence"], rows["position"])
        return cls._of(rows, index.layout)

    def save(self, path: str | Path, *, shard_tokens: int = 1 << 20) -> None:
        """Write the trace as a folder at `path`, replacing a trace that is there (never anything else)."""
        if not self.num_tokens:
            raise InputError(f"{path}: the trace to save holds no tokens; select at least one")
        has_weights = self.weights is not None
        with TraceWriter(
            Path(path), self.layout, has_weights=has_weights, shard_tokens=shard_tokens
        ) as writer:
            writer.append(self._rows())

    def select(self, mask_or_indices: npt.ArrayLike) -> Self:
        """The rows where a boolean mask [tokens] is True, or the rows at integer indices.

        Indices must keep the rows of a sequence in order; InputError otherwise.
        """
        chosen = np.asarray(mask_or_indices)
        rows = {name: array[chosen] for name, array in self._rows().items()}
        check_order("select", rows["sequence"], rows["position"])
        return self._of(rows, self.layout)

    def of_phase(self, phase: str) -> Self:
        """The rows of phase "prefill" or "decode", or of "all". Raises InputError where there are none."""
        codes = {"all": (PREFILL, DECODE), "prefill": (PREFILL,), "decode": (DECODE,)}
        if phase not in codes:
            raise InputError(f"phase {phase}: no such phase; give {', '.join(codes)}")
        rows = np.isin(self.phase, codes[phase])
        if not rows.any():
            raise InputError(f"phase {phase}: the trace holds no such tokens; give all, or another trace")
        return self if rows.all() else self.select(rows)

    def digest(self) -> str:
        """SHA-256 (hex) of the metadata and all rows; it does not depend on how the rows are sharded."""
        rows = self._rows()
        sha = hashlib.sha256(json.dumps([self.layout.metadata(), sorted(rows)]).encode())
        for name in sorted(rows):
            for start in range(0, self.num_tokens, _CHUNK_TOKENS):
                chunk = rows[name][start : start + _CHUNK_TOKENS]
                sha.update(chunk.astype(chunk.dtype.newbyteorder("<"), copy=False).tobytes())
        return sha.hexdigest()

    def _rows(self) -> Rows:
        rows: Rows = {
            "experts": self.experts,
            "sequence": self.sequence,
            "position": self.position,
            "phase": self.phase,
        }
        return rows if self.weights is None else rows | {"weights": self.weights}

    @classmethod
    def _of(cls, rows: Rows, layout: RoutingLayout) -> Self:
        return cls(
            experts=rows["experts"],
            sequence=rows["sequence"],
            position=rows["position"],
            phase=rows["phase"],
            weights=rows.get("weights"),
            num_experts=layout.num_experts,
            moe_layer_ids=layout.moe_layer_ids,
            num_hidden_layers=layout.num_hidden_layers,
            model=layout.model,
            experts_per_layer=layout.expert_counts,
        )


def _with_choices(values: npt.ArrayLike) -> npt.NDArray[Any]:
    """[tokens, layers] of a top-1 router as [tokens, layers, 1]; any other array as it is."""
    array = np.asarray(values)
    return array[:, :, np.newaxis] if array.ndim == 2 else array
