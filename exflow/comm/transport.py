"""How a job's decode steps run: captured over one-sided writes, over relays between nodes, over
collectives; or eagerly."""

import logging
import os
from importlib.util import find_spec
from typing import Literal

import torch

from exflow.errors import InputError
from exflow.job.cluster import Cluster, all_gather_object

Transport = Literal["one-sided", "relayed", "collective", "eager"]
NAMES: tuple[Transport, ...] = ("one-sided", "relayed", "collective", "eager")

_log = logging.getLogger(__name__)


def transport_named(name: str, device_type: str) -> str:
    """`name` if it can be used on such devices, `auto` included. Else raises InputError."""
    if name not in ("auto", *NAMES):
        raise InputError(f"transport {name!r} is unknown; give auto, {', '.join(NAMES)}")
    if name not in ("auto", "eager") and not _runs_on(device_type, name):
        raise InputError(f"transport {name} needs GPUs; give eager, or device cuda")
    return name


def choose_transport(name: str, cluster: Cluster, replicated: bool = False) -> Transport:
    """What `name` comes to on these ranks: the fastest that works, where it is `auto`; logs which do not
    work.

    replicated: for the strategy of that name, which has nothing to relay.
    Collective. Raises InputError where what was asked for by name does not work.
    """
    if name == "eager" or (name == "auto" and cluster.device.type != "cuda"):
        return "eager"
    wanted = _candidates(cluster, replicated) if name == "auto" else _named(name)
    for transport in wanted:
        fault = _fault(transport, cluster, replicated)
        if not fault:
            return transport if cluster.num_ranks > 1 else "one-sided"  # a single rank writes to itself
        if name != "auto":
            raise InputError(f"transport {transport}: {fault}")
        _log.warning("decode steps are not %s: %s", transport, fault)
    return "eager"


def _named(name: str) -> tuple[Transport, ...]:
    return tuple(known for known in NAMES if known == name)


def _candidates(cluster: Cluster, replicated: bool) -> tuple[Transport, ...]:
    """What `auto` tries, in this order, before steps are eager.

    Relays also where a token has one expert, and so no message to save: chunks of fixed capacity are one a
    node then, instead of one a rank.
    """
    if cluster.num_nodes == 1:
        return ("one-sided", "collective")
    if replicated:
        return ("collective",)
    return ("relayed", "collective")


def _fault(transport: str, cluster: Cluster, replicated: bool) -> str:
    """Why a transport does not work here, the same on all ranks; empty if it does."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not _runs_on(cluster.device.type, transport):
        return "there are no GPUs"
    if transport == "collective" or cluster.num_ranks == 1:
        return ""
    if transport == "one-sided" and cluster.num_nodes > 1:
        return f"the ranks are on {cluster.num_nodes} nodes"
    if transport == "relayed":
        if cluster.num_nodes == 1:
            return "the ranks are on one node"
        if cluster.ranks_per_node == 1:
            return "there is one rank on each node"
        if replicated:
            return "strategy replicated has nothing to relay; give collective"
    return _fault_of_symmetric_memory(cluster)


def _runs_on(device_type: str, transport: str) -> bool:
    """Whether there are kernels for such devices: on a CPU only interpreted ones, and collectives."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device_type == "cuda" or (transport == "collective" and interpreted)


def _fault_of_symmetric_memory(cluster: Cluster) -> str:
    from exflow.comm.buffers import symmetric_memory

    mine = ""
    try:
        symmetric_memory(cluster)(4096)
    except (RuntimeError, ImportError) as error:
        mine = str(error).splitlines()[0]
    return next((fault for fault in all_gather_object(cluster, mine) if fault), "")


def alone(device: torch.device) -> Cluster:
    """The cluster of a single process."""
    return Cluster(0, 1, 1, device)
