"""Plan: which rank hosts which expert of which layer; the file between placement and the runtime.

Shapes: L MoE layers, E experts, P slots (here P = E), G ranks, S = P / G slots a rank.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.plan_file import PlanDocument, TopologyDocument, read_document, table, write_document
from exflow.placement.topology import Topology
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Plan:
    """A placement of every expert, with what is known of its quality.

    physical_to_logical_map  [L, P] int: the expert in each slot; rank r owns the slots r*S .. (r+1)*S - 1
    next_owner               [L, E, G] int, per mille (see `next_owner_table`), or None: no preference
    objective, lower_bound   value of the solver's objective and a proven bound, in its own units, or None
    optimal                  the objective is proven minimal
    expected                 figures on the profiling trace; any JSON
    trace_digest             `RoutingTrace.digest()` of the profiling trace

    Raises InputError where the parts contradict each other.
    """

    model: str
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    topology: Topology
    physical_to_logical_map: IntArray
    next_owner: IntArray | None
    method: str
    objective: float | None = None
    lower_bound: float | None = None
    optimal: bool = False
    expected: dict[str, Any] = field(default_factory=dict)
    trace_digest: str = ""

    def __post_init__(self) -> None:
        _check_layers(self.moe_layer_ids, self.num_hidden_layers)
        if self.num_experts % self.num_ranks:
            raise InputError(
                f"num_experts: {self.num_experts} experts cannot be shared equally by {self.topology}; "
                "choose a number of ranks that divides it"
            )
        slots = (self.num_layers, self.num_experts)
        _check_shape("physical_to_logical_map", self.physical_to_logical_map, slots)
        for layer, row in enumerate(self.physical_to_logical_map):
            _check_every_expert_once(layer, row)
        if self.next_owner is not None:
            _check_shape("next_owner", self.next_owner, (*slots, self.num_ranks))
            if self.next_owner.min() < 0 or self.next_owner.max() > 1000:
                raise InputError("next_owner: holds values outside 0..1000; give per mille")

    @classmethod
    def from_ranks(
        cls,
        rank_of_expert: IntArray,
        topology: Topology,
        trace: RoutingTrace,
        *,
        method: str,
        objective: float | None = None,
        lower_bound: float | None = None,
        optimal: bool = False,
        expected: dict[str, Any] | None = None,
    ) -> Self:
        """The plan that puts expert e of layer l on rank `rank_of_expert[l, e]`, for the trace's model.

        A rank's experts fill its slots in ascending order of id. `next_owner` is counted from the trace.
        """
        from exflow.placement.owners import next_owner_table  # compiled: not needed to load a plan

        _check_shape("rank_of_expert", rank_of_expert, (trace.num_layers, trace.num_experts))
        _check_equal_shares(rank_of_expert, topology.num_ranks)
        return cls(
            model=trace.model,
            num_hidden_layers=trace.num_hidden_layers,
            moe_layer_ids=trace.moe_layer_ids,
            num_experts=trace.num_experts,
            topology=topology,
            physical_to_logical_map=np.argsort(rank_of_expert, axis=1, kind="stable"),
            next_owner=next_owner_table(trace, rank_of_expert, topology.num_ranks),
            method=method,
            objective=objective,
            lower_bound=lower_bound,
            optimal=optimal,
            expected=expected or {},
            trace_digest=trace.digest(),
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan file; InputError names the file, the key at fault and the remedy."""
        document = read_document(Path(path))
        try:
            return cls._of(document)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan file, atomically."""
        write_document(Path(path), self._document())

    @property
    def num_ranks(self) -> int:
        return self.topology.num_ranks

    @property
    def num_layers(self) -> int:
        """The number of MoE layers."""
        return len(self.moe_layer_ids)

    @property
    def slots_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def slot_of_expert(self) -> npt.NDArray[np.int64]:
        """[L, E] int64, the inverse of `physical_to_logical_map`."""
        return np.argsort(self.physical_to_logical_map, axis=1)

    @property
    def rank_of_expert(self) -> npt.NDArray[np.int64]:
        """[L, E] int64."""
        return self.slot_of_expert // self.slots_per_rank

    @property
    def gap(self) -> float | None:
        """How far the objective may be above the minimum, as a share of it; None where no bound is known."""
        if self.objective is None or self.lower_bound is None:
            return None
        return (self.objective - self.lower_bound) / self.objective if self.objective else 0.0

    def check_model(self, num_experts: int, moe_layer_ids: Sequence[int], num_ranks: int) -> None:
        """Raise InputError if the plan is not for such a model on so many ranks."""
        self._check_routing("the model", num_experts, moe_layer_ids)
        if num_ranks != self.num_ranks:
            raise InputError(
                f"the plan is for {self.topology}, launched with {num_ranks}; "
                f"start {self.num_ranks} processes, or place again for {num_ranks}"
            )

    def check_trace(self, trace: RoutingTrace) -> None:
        """Raise InputError if the trace is of another model than the plan."""
        self._check_routing("the trace", trace.num_experts, trace.moe_layer_ids)

    def _check_routing(self, other: str, num_experts: int, moe_layer_ids: Sequence[int]) -> None:
        differences = (
            ("experts a layer", self.num_experts, num_experts),
            ("MoE layers", self.num_layers, len(moe_layer_ids)),
            ("as moe_layer_ids", list(self.moe_layer_ids), list(moe_layer_ids)),
        )
        for what, ours, theirs in differences:
            if ours != theirs:
                raise InputError(
                    f"the plan is for {ours} {what}, {other} has {theirs}; "
                    "use a plan that was placed on a trace of this model"
                )

    @classmethod
    def _of(cls, document: PlanDocument) -> Self:
        topology = Topology(**document.topology.model_dump())
        slots = (len(document.moe_layer_ids), document.num_experts)
        owners = document.next_owner
        return cls(
            model=document.model,
            num_hidden_layers=document.num_hidden_layers,
            moe_layer_ids=tuple(document.moe_layer_ids),
            num_experts=document.num_experts,
            topology=topology,
            physical_to_logical_map=table("physical_to_logical_map", document.physical_to_logical_map, slots),
            next_owner=None if owners is None else table("next_owner", owners, (*slots, topology.num_ranks)),
            method=document.method,
            objective=document.objective,
            lower_bound=document.lower_bound,
            optimal=document.optimal,
            expected=document.expected,
            trace_digest=document.trace_digest,
        )

    def _document(self) -> PlanDocument:
        return PlanDocument(
            format="exflow-plan",
            version=1,
            model=self.model,
            num_hidden_layers=self.num_hidden_layers,
            moe_layer_ids=[int(layer) for layer in self.moe_layer_ids],
            num_experts=self.num_experts,
            topology=TopologyDocument(**vars(self.topology)),
            method=self.method,
            objective=self.objective,
            lower_bound=self.lower_bound,
            optimal=bool(self.optimal),
            expected=self.expected,
            trace_digest=self.trace_digest,
            physical_to_logical_map=self.physical_to_logical_map.tolist(),
            next_owner=None if self.next_owner is None else self.next_owner.tolist(),
        )


def _check_layers(moe_layer_ids: tuple[int, ...], num_hidden_layers: int) -> None:
    ascending = moe_layer_ids and list(moe_layer_ids) == sorted(set(moe_layer_ids))
    if not ascending or moe_layer_ids[0] < 0 or moe_layer_ids[-1] >= num_hidden_layers:
        raise InputError(
            f"moe_layer_ids: are {list(moe_layer_ids)} in a model of {num_hidden_layers} hidden layers; "
            "give ascending indices of hidden layers, at least one"
        )


def _check_shape(key: str, array: IntArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{key}: has the shape {array.shape} instead of {shape}; place again on this trace")


def _check_every_expert_once(layer: int, row: IntArray) -> None:
    """`row` [P] holds the experts of a layer's slots; there are as many slots as experts."""
    placed, wanted = Counter(row.tolist()), Counter(range(len(row)))
    if placed != wanted:
        raise InputError(
            f"physical_to_logical_map[{layer}]: holds expert {min(placed - wanted)} once too often and "
            f"expert {min(wanted - placed)} not at all; place each expert 0..{len(row) - 1} exactly once"
        )


def _check_equal_shares(rank_of_expert: IntArray, num_ranks: int) -> None:
    num_experts = rank_of_expert.shape[1]
    for layer, ranks in enumerate(rank_of_expert):
        shares = [int((ranks == rank).sum()) for rank in range(num_ranks)]
        if [share * num_ranks for share in shares] != [num_experts] * num_ranks:
            raise InputError(
                f"rank_of_expert[{layer}]: gives the ranks {shares} of {num_experts} experts; "
                f"give each of the {num_ranks} ranks the same number"
            )
