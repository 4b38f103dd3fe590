"""Plan: which rank hosts which expert of which layer; the file between placement and the runtime.

Shapes: L MoE layers, E experts, P slots, G ranks, S = P / G slots a rank. Where P > E the hottest experts
have several replicas, each in a slot of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.plan.plan_file import (
    PlanDocument,
    TopologyDocument,
    read_document,
    table,
    write_document,
)
from exflow.placement.plan.replicas import hosting, serving_slots
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Plan:
    """A placement of every expert, with what is known of its quality.

    num_experts              E, of the layer that has most; `experts_per_layer` [L] says how many each has
    physical_to_logical_map  [L, P] int: the expert in each slot; rank r owns the slots r*S .. (r+1)*S - 1
    next_owner               [L, E, G] int, per mille (see `next_owner_table`), or None: no preference
    strategy                 the strategy that it was made for, one of strategy.OWNED
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
    experts_per_layer: tuple[int, ...] = ()  # by default E in each
    strategy: Strategy = Strategy.COHERENT
    objective: float | None = None
    lower_bound: float | None = None
    optimal: bool = False
    expected: dict[str, Any] = field(default_factory=dict)
    trace_digest: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", Strategy(self.strategy))
        _check_layers(self.moe_layer_ids, self.num_hidden_layers)
        if not self.experts_per_layer:
            object.__setattr__(self, "experts_per_layer", (self.num_experts,) * self.num_layers)
        if len(self.experts_per_layer) != self.num_layers or max(self.experts_per_layer) != self.num_experts:
            raise InputError(
                f"experts_per_layer: is {list(self.experts_per_layer)}; give a number for each of the "
                f"{self.num_layers} MoE layers, {self.num_experts} at most and at least once"
            )
        num_slots = self.physical_to_logical_map.shape[-1]
        _check_shape(
            "physical_to_logical_map", self.physical_to_logical_map, (self.num_layers, max(num_slots, 1))
        )
        if num_slots % self.num_ranks:
            raise InputError(
                f"physical_to_logical_map: {num_slots} slots cannot be shared equally by {self.topology}; "
                "choose a number of ranks that divides it"
            )
        for layer, (row, count) in enumerate(
            zip(self.physical_to_logical_map, self.experts_per_layer, strict=True)
        ):
            _check_every_expert_placed(layer, row, count)
        if self.next_owner is not None:
            _check_shape("next_owner", self.next_owner, (self.num_layers, self.num_experts, self.num_ranks))
            if self.next_owner.min() < 0 or self.next_owner.max() > 1000:
                raise InputError("next_owner: holds values outside 0..1000; give per mille")

    @classmethod
    def of_slots(
        cls,
        physical_to_logical_map: IntArray,
        topology: Topology,
        trace: RoutingTrace,
        *,
        method: str,
        strategy: Strategy = Strategy.COHERENT,
        objective: float | None = None,
        lower_bound: float | None = None,
        optimal: bool = False,
        expected: dict[str, Any] | None = None,
    ) -> Self:
        """The plan with these experts in the slots [L, P], for the trace's model.

        A rank's experts are put into ascending order of id. `next_owner` is counted from the trace.
        """
        from exflow.placement.counts.owners import next_owner_table  # compiled: not needed to load a plan

        slots = np.asarray(physical_to_logical_map)
        if slots.ndim != 2 or slots.shape[1] % topology.num_ranks:
            raise InputError(
                f"physical_to_logical_map: has the shape {slots.shape}; give [layers, slots], and a multiple "
                f"of {topology.num_ranks} slots"
            )
        by_rank = slots.reshape(len(slots), topology.num_ranks, -1)
        plan = cls(
            model=trace.model,
            num_hidden_layers=trace.num_hidden_layers,
            moe_layer_ids=trace.moe_layer_ids,
            num_experts=trace.num_experts,
            experts_per_layer=trace.experts_per_layer,
            topology=topology,
            physical_to_logical_map=np.sort(by_rank, axis=2).reshape(slots.shape),
            next_owner=None,
            strategy=strategy,
            method=method,
            objective=objective,
            lower_bound=lower_bound,
            optimal=optimal,
            expected=expected or {},
            trace_digest=trace.digest(),
        )
        return replace(plan, next_owner=next_owner_table(trace, plan.hosts))

    @classmethod
    def from_ranks(
        cls, rank_of_expert: IntArray, topology: Topology, trace: RoutingTrace, *, method: str, **known: Any
    ) -> Self:
        """The plan without replicas that puts expert e of layer l on rank `rank_of_expert[l, e]`.

        `known` are further arguments of `of_slots`. Raises InputError unless the ranks share the experts
        equally.
        """
        _check_shape("rank_of_expert", rank_of_expert, (trace.num_layers, trace.num_experts))
        _check_equal_shares(rank_of_expert, topology.num_ranks)
        slots = np.argsort(rank_of_expert, axis=1, kind="stable")
        return cls.of_slots(slots, topology, trace, method=method, **known)

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
    def num_slots(self) -> int:
        """P, of each layer."""
        return int(self.physical_to_logical_map.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def serving_slot(self) -> npt.NDArray[np.int64]:
        """[G, L, E] int64: where a token owned by rank g goes for expert e (see `serving_slots`)."""
        return serving_slots(self.physical_to_logical_map, self.num_experts, self.topology)

    @property
    def hosts(self) -> npt.NDArray[np.bool_]:
        """[L, E, G]: whether rank g has a replica of expert e."""
        return hosting(self.physical_to_logical_map, self.num_experts, self.num_ranks)

    @property
    def rank_of_expert(self) -> npt.NDArray[np.int64]:
        """[L, E] int64: the rank that hosts each expert, the lowest of several; -1 where a layer lacks it."""
        hosts = self.hosts
        return np.asarray(np.where(hosts.any(axis=2), hosts.argmax(axis=2), -1), dtype=np.int64)

    @property
    def group_size(self) -> int:
        """Ranks of a coherence group under the strategy that the plan was made for."""
        return self.strategy.group_size(self.num_ranks, self.topology.gpus_per_node)

    @property
    def gap(self) -> float | None:
        """(objective - lower bound) / objective: the most the objective can exceed the minimum; None without
        a bound."""
        if self.objective is None or self.lower_bound is None:
            return None
        return (self.objective - self.lower_bound) / self.objective if self.objective else 0.0

    def check_model(self, num_experts: int, moe_layer_ids: Sequence[int], num_ranks: int) -> None:
        """Raise InputError if the plan is for another model or another number of ranks."""
        self._check_routing("the model", num_experts, moe_layer_ids, [num_experts] * len(moe_layer_ids))
        if num_ranks != self.num_ranks:
            raise InputError(
                f"the plan is for {self.topology}, launched with {num_ranks}; "
                f"start {self.num_ranks} processes, or place again for {num_ranks}"
            )

    def check_trace(self, trace: RoutingTrace) -> None:
        """Raise InputError if the trace is of another model than the plan."""
        self._check_routing("the trace", trace.num_experts, trace.moe_layer_ids, trace.experts_per_layer)

    def _check_routing(
        self, other: str, num_experts: int, moe_layer_ids: Sequence[int], experts_per_layer: Sequence[int]
    ) -> None:
        differences = (
            ("experts a layer", self.num_experts, num_experts),
            ("MoE layers", self.num_layers, len(moe_layer_ids)),
            ("as moe_layer_ids", list(self.moe_layer_ids), list(moe_layer_ids)),
            *(
                (f"experts in MoE layer {layer}", *counts)
                for layer, counts in enumerate(zip(self.experts_per_layer, experts_per_layer, strict=False))
            ),
        )
        for what, ours, theirs in differences:
            if ours != theirs:
                raise InputError(
                    f"the plan is for {ours} {what}, {other} has {theirs}; "
                    "use a plan that was placed on a trace of this model"
                )

    @classmethod
    def _of(cls, document: PlanDocument) -> Self:
        topology = document.topology.topology()
        layers, rows, owners = (
            len(document.moe_layer_ids),
            document.physical_to_logical_map,
            document.next_owner,
        )
        slots = (layers, len(rows[0]) if rows else 0)
        by_owner = (layers, document.num_experts, topology.num_ranks)
        return cls(
            model=document.model,
            num_hidden_layers=document.num_hidden_layers,
            moe_layer_ids=tuple(document.moe_layer_ids),
            num_experts=document.num_experts,
            experts_per_layer=tuple(
                table("experts_per_layer", document.experts_per_layer, (layers,)).tolist()
            ),
            topology=topology,
            physical_to_logical_map=table("physical_to_logical_map", rows, slots),
            next_owner=None if owners is None else table("next_owner", owners, by_owner),
            strategy=document.strategy,
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
            version=2,
            **placement_keys(self),
            objective=self.objective,
            lower_bound=self.lower_bound,
            optimal=bool(self.optimal),
            expected=self.expected,
            trace_digest=self.trace_digest,
            physical_to_logical_map=self.physical_to_logical_map.tolist(),
            next_owner=None if self.next_owner is None else self.next_owner.tolist(),
        )


def placement_keys(plan: Plan) -> dict[str, Any]:
    """The keys that a plan file and a sidecar share (see PlacementDocument), without format and version."""
    return {
        "model": plan.model,
        "num_hidden_layers": plan.num_hidden_layers,
        "moe_layer_ids": [int(layer) for layer in plan.moe_layer_ids],
        "num_experts": plan.num_experts,
        "experts_per_layer": [int(count) for count in plan.experts_per_layer],
        "topology": TopologyDocument.of(plan.topology),
        "strategy": plan.strategy,
        "method": plan.method,
    }


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


def _check_every_expert_placed(layer: int, row: IntArray, num_experts: int) -> None:
    """Raise InputError unless `row` [P], the experts in a layer's slots, holds every expert and no other."""
    key = f"physical_to_logical_map[{layer}]"
    unknown = row[(row < 0) | (row >= num_experts)]
    if len(unknown):
        raise InputError(
            f"{key}: holds expert {unknown[0]}, but the layer has {num_experts}; place 0..{num_experts - 1}"
        )
    missing = np.setdiff1d(np.arange(num_experts), row)
    if len(missing):
        raise InputError(f"{key}: does not hold expert {missing[0]}; place each of 0..{num_experts - 1}")


def _check_equal_shares(rank_of_expert: IntArray, num_ranks: int) -> None:
    num_experts = rank_of_expert.shape[1]
    for layer, ranks in enumerate(rank_of_expert):
        shares = [int((ranks == rank).sum()) for rank in range(num_ranks)]
        if [share * num_ranks for share in shares] != [num_experts] * num_ranks:
            raise InputError(
                f"rank_of_expert[{layer}]: gives the ranks {shares} of {num_experts} experts; "
                f"give each of the {num_ranks} ranks the same number"
            )
