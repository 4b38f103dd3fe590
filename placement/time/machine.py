"""The hardware of a job's ranks: links, memory, processors; measured (probe.py) or given (machines.py)."""

import math
from dataclasses import dataclass

from pydantic import ConfigDict

from exflow.comm.capacity import ROUND_BYTES
from exflow.comm.transport_names import Transport

_EXACT = ConfigDict(extra="forbid")  # for files


@dataclass(frozen=True)
class Link:
    """Speed of a rank's exchanges with the other ranks of its node, or with the ranks of other nodes.

    latency_s: time of an empty all-to-all. bytes_per_s: bandwidth of one rank in each direction, while all
    ranks send. peer_s: extra time for each rank that the link leads to; 0 where the latency was measured
    among all ranks, and so includes it.
    """

    __pydantic_config__ = _EXACT

    latency_s: float
    bytes_per_s: float
    peer_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """The hardware below each rank, and how exchanges use it.

    inside, between   the links of a rank inside its node, and to other nodes
    read_bytes_per_s  bandwidth of a rank's memory
    memory_bytes      a rank's memory for weights, keys and values
    layer_s           extra time of a layer: launches
    token_s           extra time of each token in a layer: arithmetic of eager steps
    round_bytes       granularity by which an eager exchange sizes its buffers (comm/capacity.py)
    hides             share of the compute time that hides exchanges in the background, 0 to 1; 0 where one
                      processor does both
    shared            whether all ranks share one processor: they wait for the sum of their work, and not for
                      the rank with the most
    transport         how exchanges run (comm/transport.py)
    flops_per_s       speed of matrix products in a captured step; eager steps have them in token_s
    """

    __pydantic_config__ = _EXACT

    inside: Link
    between: Link
    read_bytes_per_s: float
    memory_bytes: float
    layer_s: float = 0.0
    token_s: float = 0.0
    round_bytes: int = ROUND_BYTES["cpu"]
    hides: float = 1.0
    shared: bool = False
    transport: Transport = "eager"
    flops_per_s: float = math.inf
