"""DeepSeek's EPLB as a function of the same name, arguments and results, with affinity as a further wish.

The interface is that of `rebalance_experts` in eplb.py of deepseek-ai/EPLB (and its copies in engines); the
methods are ours. Torch is never imported: a tensor is turned into an array, and the arrays back, by its own
methods.

Shapes: L MoE layers, E experts, P slots, X the most replicas of an expert.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.plan.logical_maps import logical_maps
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.levelling import levelled
from exflow.placement.solve.load_only import replica_counts

if TYPE_CHECKING:
    from exflow.placement.counts.affinity import AffinityCounts
    from exflow.placement.time.serving import Serving
    from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.int64]
Array = TypeVar("Array")  # numpy.ndarray or torch.Tensor


def rebalance_experts(
    weight: Array,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    affinity: "AffinityCounts | None" = None,
    time_limit: float = math.inf,
    trace: "RoutingTrace | None" = None,
    serving: "Serving | None" = None,
) -> tuple[Array, Array, Array]:
    """Place the replicas of each expert on GPUs, given the loads `weight` [L, E]: an array or a torch tensor.

    num_replicas  P, a multiple of num_gpus, E at least
    num_groups    expert groups; if num_nodes divides it, each group's experts share a node, and groups must
                  be of one size; else neither groups nor nodes are looked at
    num_nodes     nodes, between which links are slower; divides num_gpus where it is looked at
    affinity      counts of a trace of this model (`count_affinity`). With them the solver minimises the
                  messages of dispatch and combine besides the imbalance: experts that tokens select together
                  share a GPU or a node. Loads are still those of `weight`; groups are then not looked at, for
                  what they do to routing is in the counts, and nodes always are
    trace         routing of this model. With it the plan has the least predicted time (`place_for_time`);
                  loads are those of the trace, and `weight` is asked for its shape alone
    serving       the setting of that time; by default target eplb on a node of H200s
    time_limit    seconds for the solver to search, which for the largest models goes on for minutes

    Returns, as int64 arrays or CPU tensors like `weight`,
    physical_to_logical_map  [L, P]; GPU g owns the slots g * P / num_gpus and up
    logical_to_physical_map  [L, E, X], an expert's slots in ascending order, padded with -1
    expert_count             [L, E]

    Without affinity no layer's busiest GPU has more load than by the original, and X is the original's, which
    can be more than any expert's replicas here.

    The same arguments give the same result, so that every rank may call it for itself; with a time limit that
    ends a search they may not: call it on one rank and tell the others. Raises InputError (a ValueError)
    where the numbers contradict each other.
    """
    load = _as_array(weight)
    if affinity is not None and trace is not None:
        raise InputError("affinity and trace both say what to place by; give one")
    if affinity is not None or trace is not None:
        num_groups = 1
    elif num_nodes and num_groups % num_nodes:  # the original's global policy
        num_groups = num_nodes = 1
    _check(load, num_replicas, num_groups, num_nodes, num_gpus)
    if trace is not None:
        slots, most = _by_time(load, num_replicas, num_nodes, num_gpus, trace, serving, time_limit), 1
    elif affinity is None:
        # A power of two changes no digit, and brings each layer's loads within single precision.
        load = np.ldexp(load, -np.frexp(load.max(axis=1, keepdims=True))[1])
        of_group = _group_sums(weight, load, num_groups)
        slots, most = levelled(load, of_group, num_replicas, num_nodes, num_gpus)
    else:
        slots, most = _by_affinity(load, num_replicas, num_nodes, num_gpus, affinity, time_limit), 1
    logical_to_physical, count = logical_maps(slots, load.shape[1], most)
    return _like(weight, slots), _like(weight, logical_to_physical), _like(weight, count)


def _by_affinity(
    load: npt.NDArray[np.float64],
    num_replicas: int,
    num_nodes: int,
    num_gpus: int,
    affinity: "AffinityCounts",
    time_limit: float,
) -> IntArray:
    """[L, P]: replicas by load, their places by the solver; a rank's experts in ascending order."""
    from exflow.placement.solve.objective import Objective, items_of, make_problem  # compiled solvers
    from exflow.placement.solve.solve import solve

    if affinity.load.shape != load.shape:
        raise InputError(
            f"affinity: its loads have the shape {affinity.load.shape}, weight has {load.shape}; count a "
            "trace of this model"
        )
    topology = Topology(num_nodes=num_nodes, gpus_per_node=num_gpus // num_nodes)
    replicas = replica_counts(load, num_replicas, num_gpus)
    idle = load.sum(axis=1, keepdims=True) == 0  # a layer never seen: any balance is as good
    counts = replace(affinity, load=np.where(idle, 1.0, load))
    problem = make_problem([counts], [1.0], topology, Objective(Strategy.DISPATCH_COMBINE), replicas)
    assignment = solve(problem, topology, time_limit=time_limit).assignment
    order = np.argsort(assignment, axis=1, kind="stable")
    return np.take_along_axis(items_of(replicas), order, axis=1)


def _by_time(
    load: npt.NDArray[np.float64],
    num_replicas: int,
    num_nodes: int,
    num_gpus: int,
    trace: "RoutingTrace",
    serving: "Serving | None",
    time_limit: float,
) -> IntArray:
    """[L, P]: the plan of least time on the trace; a rank's experts in ascending order."""
    from exflow.placement.fastest_plan import place_for_time  # compiled searches
    from exflow.placement.time.serving import Serving

    if load.shape != (trace.num_layers, trace.num_experts):
        raise InputError(
            f"trace: has {trace.num_layers} MoE layers of {trace.num_experts} experts, weight has the shape "
            f"{load.shape}; record this model"
        )
    plan = place_for_time(
        trace,
        Topology(num_nodes=num_nodes, gpus_per_node=num_gpus // num_nodes),
        serving or Serving("eplb"),
        redundant_experts=num_replicas - trace.num_experts,
        time_limit=time_limit,
    )
    return plan.physical_to_logical_map.astype(np.int64)


def _check(
    load: npt.NDArray[np.float64], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    if load.ndim != 2 or not load.size:
        raise InputError(f"weight: has the shape {load.shape}; give [layers, experts], at least one of each")
    if not np.isfinite(load).all() or (load < 0).any():
        raise InputError("weight: holds negative or non-finite values; give counts or shares of tokens")
    counts = {"num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} is {count}; give 1 or more")
    for name, value, divisor, divided_by in (
        ("num_replicas", num_replicas, "num_gpus", num_gpus),
        ("num_gpus", num_gpus, "num_nodes", num_nodes),
        ("the number of experts", load.shape[1], "num_groups", num_groups),
    ):
        if value % divided_by:
            raise InputError(f"{name} is {value}, {divisor} is {divided_by}; give a multiple")
    if num_replicas < load.shape[1]:
        raise InputError(f"num_replicas is {num_replicas} for {load.shape[1]} experts; give as many at least")


def _as_array(weight: Any) -> npt.NDArray[np.float64]:
    """[L, E] float64 of an array or of a tensor on any device and of any dtype."""
    if hasattr(weight, "detach"):
        weight = weight.detach().cpu().double().numpy()
    return np.asarray(weight, dtype=np.float64)


def _group_sums(weight: Any, load: npt.NDArray[np.float64], num_groups: int) -> npt.NDArray[np.float32]:
    """[L, groups]: the load of each group; of a tensor by its own sum, so that rounding orders equal groups
    as the original does."""
    single: Any = weight.detach().cpu().float() if hasattr(weight, "detach") else load.astype(np.float32)
    return np.asarray(single.reshape(len(load), num_groups, -1).sum(-1))


def _like(weight: Any, values: IntArray) -> Any:
    """`values` as an int64 tensor on the CPU if `weight` is a tensor, else as they are."""
    return weight.detach().cpu().long().new_tensor(values) if hasattr(weight, "detach") else values
