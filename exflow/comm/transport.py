"""Choice of the transport of a job's decode steps.

Captured steps exchange rows by one-sided writes, by relays between nodes, or by collectives. Other steps run
eagerly.
"""

import logging
import os
from importlib.util import find_spec

import torch

from exflow.comm.transport_names import NAMES, Transport
from exflow.errors import InputError
from exflow.job.cluster import Cluster, all_gather_object

_log = logging.getLogger(__name__)


def transport_named(name: str, device_type: str) -> str:
    """Return `name` if this transport, or `auto`, can be used on this device type; else raise InputError."""
    if name not in ("auto", *NAMES):
        raise InputError(f"transport {name!r} is unknown; give auto, {', '.join(NAMES)}")
    if name not in ("auto", "eager") and not _runs_on(device_type, name):
        raise InputError(f"transport {name} needs GPUs; give eager, or device cuda")
    return name


def choose_transport(name: str, cluster: Cluster, replicated: bool = False) -> Transport:
    """The transport that `name` stands for on these ranks; for `auto` the fastest one that works.

    Logs why faster transports do not work. replicated: True for the strategy `replicated`, which has nothing
    to relay. Collective. Raises InputError if a transport asked for by name does not work.
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
    """The transports that `auto` tries, in this order, before steps are eager.

    Relays come first for top-1 too, although they save no messages then: a rank sends one chunk of fixed
    capacity to each node instead of one to each rank.
    """
    if cluster.num_nodes == 1:
        return ("one-sided", "collective")
    if replicated:
        return ("collective",)
    return ("relayed", "collective")


def _fault(transport: str, cluster: Cluster, replicated: bool) -> str:
    """The reason why a transport does not work here, equal on all ranks; empty if it works."""
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
    """True if a transport has kernels for a device type; on CPUs only `collective` has, interpreted ones."""
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
