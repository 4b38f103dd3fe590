"""Plan: which rank hosts which expert of which layer; the file between placement and the runtime.

Shapes: L MoE layers, E experts, P slots, G ranks, S = P / G slots a rank. Where P > E the hottest experts
have several replicas, each in a slot of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.plan.checks import (
    check_equal_shares,
    check_every_expert_placed,
    check_layers,
    check_served,
    check_shape,
)
from exflow.placement.plan.plan_file import (
    VERSION,
    PlanDocument,
    TopologyDocument,
    read_document,
    table,
    write_document,
)
from exflow.placement.plan.replicas import ReplicaRule, hosting, serving_slots
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
    serving_rank             [L, E, G] int: the rank that serves the tokens owned by rank g for expert e, 0
                             where a layer lacks the expert; or None: the nearest (ReplicaRule.NEAREST)
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
    serving_rank: IntArray | None = None
    strategy: Strategy = Strategy.COHERENT
    objective: float | None = None
    lower_bound: float | None = None
    optimal: bool = False
    expected: dict[str, Any] = field(default_factory=dict)
    trace_digest: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", Strategy(self.strategy))
        check_layers(self.moe_layer_ids, self.num_hidden_layers)
        if not self.experts_per_layer:
            object.__setattr__(self, "experts_per_layer", (self.num_experts,) * self.num_layers)
        if len(self.experts_per_layer) != self.num_layers or max(self.experts_per_layer) != self.num_experts:
            raise InputError(
                f"experts_per_layer: is {list(self.experts_per_layer)}; give a number for each of the "
                f"{self.num_layers} MoE layers, {self.num_experts} at most and at least once"
            )
        num_slots = self.physical_to_logical_map.shape[-1]
        check_shape(
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
            check_every_expert_placed(layer, row, count)
        if self.next_owner is not None:
            check_shape("next_owner", self.next_owner, (self.num_layers, self.num_experts, self.num_ranks))
            if self.next_owner.min() < 0 or self.next_owner.max() > 1000:
                raise InputError("next_owner: holds values outside 0..1000; give per mille")
        if self.serving_rank is not None:
            check_shape(
                "serving_rank", self.serving_rank, (self.num_layers, self.num_experts, self.num_ranks)
            )
            check_served(self.serving_rank, self.hosts)

    @classmethod
    def of_slots(
        cls,
        physical_to_logical_map: IntArray,
        topology: Topology,
        trace: RoutingTrace,
        *,
        method: str,
        strategy: Strategy = Strategy.COHERENT,
        serving_rank: IntArray | None = None,
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
            serving_rank=serving_rank,
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
        check_shape("rank_of_expert", rank_of_expert, (trace.num_layers, trace.num_experts))
        check_equal_shares(rank_of_expert, topology.num_ranks)
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
        write_document(Path(path), self.document())

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

    @cached_property
    def serving_slot(self) -> npt.NDArray[np.int64]:
        """[G, L, E] int64: where a token owned by rank g goes for expert e, in our own runtime."""
        slots: npt.NDArray[np.int64] = self.serving_slots(ReplicaRule.TABLE)[0]
        return slots

    def serving_slots(self, rule: ReplicaRule) -> npt.NDArray[np.int64]:
        """[W, G, L, E] int64: where a token owned by rank g goes for expert e in turn w (see ReplicaRule)."""
        if rule != ReplicaRule.TABLE or self.serving_rank is None:
            return serving_slots(self.physical_to_logical_map, self.num_experts, self.topology, rule)
        first = np.full((self.num_layers, self.num_experts, self.num_ranks), -1, dtype=np.int64)
        for slot in reversed(range(self.num_slots)):
            experts = self.physical_to_logical_map[:, slot]
            first[np.arange(self.num_layers), experts, slot // self.slots_per_rank] = slot
        serving = np.take_along_axis(first, np.asarray(self.serving_rank), axis=2)
        return np.ascontiguousarray(serving.transpose(2, 0, 1))[None]

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
        layers, rows = len(document.moe_layer_ids), document.physical_to_logical_map
        owners, serving = document.next_owner, document.serving_rank
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
            serving_rank=None if serving is None else table("serving_rank", serving, by_owner),
            strategy=document.strategy,
            method=document.method,
            objective=document.objective,
            lower_bound=document.lower_bound,
            optimal=document.optimal,
            expected=document.expected,
            trace_digest=document.trace_digest,
        )

    def document(self) -> PlanDocument:
        """The content of the plan file."""
        return PlanDocument(
            format="exflow-plan",
            version=VERSION,
            **placement_keys(self),
            objective=self.objective,
            lower_bound=self.lower_bound,
            optimal=bool(self.optimal),
            expected=self.expected,
            trace_digest=self.trace_digest,
            physical_to_logical_map=self.physical_to_logical_map.tolist(),
            next_owner=None if self.next_owner is None else self.next_owner.tolist(),
            serving_rank=None if self.serving_rank is None else self.serving_rank.tolist(),
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
