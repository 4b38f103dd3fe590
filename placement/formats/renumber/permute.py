"""Renumbering by a plan: new expert i of a layer is old expert p[i].

p is the layer's row of physical_to_logical_map. Experts and the rows of their router move together, so the
model computes the same, and contiguous expert parallelism puts each expert where the plan wants it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exflow.errors import InputError
from exflow.placement.formats.renumber.tensors import Kind, Role, renamed
from exflow.placement.plan.plan import Plan

Orders = Mapping[int, tuple[int, ...]]
"""For each MoE layer, by its index among the hidden layers, the old expert of each new one."""


@dataclass(frozen=True)
class Change:
    """A tensor's new name, and the old row of each new one; rows is None where the values stay."""

    name: str
    rows: tuple[int, ...] | None = None


def orders_of(plan: Plan) -> dict[int, tuple[int, ...]]:
    """The orders of a plan; raises InputError if experts have replicas or layers differ in experts."""
    if len(set(plan.experts_per_layer)) > 1:
        raise InputError(
            f"experts_per_layer: is {list(plan.experts_per_layer)}, and only layers with equal numbers of "
            "experts can be renumbered; export the plan for an engine that takes a map"
        )
    if plan.num_slots != plan.num_experts:
        raise InputError(
            f"physical_to_logical_map: holds {plan.num_slots} slots for {plan.num_experts} experts, and a "
            "renumbered checkpoint has no replicas; place again without replicas"
        )
    rows = plan.physical_to_logical_map.tolist()
    return {layer: tuple(row) for layer, row in zip(plan.moe_layer_ids, rows, strict=True)}


def change_of(name: str, role: Role, shape: Sequence[int], orders: Orders) -> Change:
    """The change of a tensor; raises InputError if its shape has no row for each expert."""
    if role.layer is None or role.kind not in (Kind.OWN, Kind.STACKED, Kind.ROUTER):
        return Change(name)
    order = orders[role.layer]
    if role.kind == Kind.OWN:
        assert role.expert is not None
        return Change(renamed(name, role, order.index(role.expert)))
    if _one_for_all(name, shape):
        return Change(name)
    row_for_each = bool(shape) and shape[0] == len(order)
    one_row = role.kind == Kind.ROUTER and math.prod(shape) == len(order) == shape[-1]  # [1, E], of Ernie
    if not (row_for_each or one_row):
        raise InputError(
            f"the tensor '{name}' has the shape {list(shape)}, not a row for each of {len(order)} experts; "
            "use a plan placed on a trace of this model, or a checkpoint with weights of another type"
        )
    return Change(name) if order == tuple(range(len(order))) else Change(name, order)


def check_groups(n_group: int, orders: Orders) -> None:
    """Raise InputError unless each routing group keeps its experts and its place.

    Routers with groups choose groups of neighbouring experts first, and then experts in them.
    """
    for layer, order in orders.items():
        size = max(1, len(order) // n_group)
        for group in range(n_group):
            found = sorted({expert // size for expert in order[group * size : (group + 1) * size]})
            if found != [group]:
                what = (
                    f"splits routing group {found[0]}"
                    if len(found) > 1
                    else f"puts routing group {found[0]} in the place of group {group}"
                )
                raise InputError(
                    f"n_group is {n_group}, and the plan {what} in layer {layer}; place again so that "
                    "routing groups stay whole and in order, or export the plan for an engine with maps"
                )


def check_layers(found: Mapping[int, set[int]], with_router: set[int], orders: Orders, source: Path) -> None:
    """Raise InputError unless each layer of the plan, and no other, has all experts and a router.

    found: experts with tensors of their own in each MoE layer; empty where they are stacked.
    """
    remedy = "use a plan that was placed on a trace of this model"
    if found.keys() != orders.keys():
        raise InputError(
            f"{source}: the layers with experts are {sorted(found)}, those of the plan are {sorted(orders)}; "
            f"{remedy}"
        )
    for layer, experts in found.items():
        if experts and experts != set(range(len(orders[layer]))):
            raise InputError(
                f"{source}: layer {layer} has the experts 0 to {max(experts)}, {len(experts)} in number, the "
                f"plan has {len(orders[layer])}; {remedy}"
            )
    if one_alone := sorted(with_router ^ found.keys()):
        has, lacks = ("a router", "experts") if one_alone[0] in with_router else ("experts", "a router")
        raise InputError(
            f"{source}: layer {one_alone[0]} has {has}, and lacks {lacks} with a known name; save the model "
            "with save_pretrained() of transformers"
        )


def _one_for_all(name: str, shape: Sequence[int]) -> bool:
    """True for a scale that all experts of a layer share."""
    return name.endswith(("scale", "scale_inv", "scale_2")) and math.prod(shape) == 1
