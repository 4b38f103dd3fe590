"""Where the GPUs are: nodes, and the GPUs inside each."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Equal nodes of `gpus_per_node` GPUs; node n holds the ranks n * gpus_per_node and up.

    Raises InputError where a count is below 1.
    """

    num_nodes: int = 1
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name, count in (("num_nodes", self.num_nodes), ("gpus_per_node", self.gpus_per_node)):
            if count < 1:
                raise InputError(f"topology: {name} is {count}; it must be at least 1")

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def node_of_rank(self) -> npt.NDArray[np.int64]:
        """[num_ranks] int64."""
        return np.arange(self.num_ranks) // self.gpus_per_node

    def __str__(self) -> str:
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        return f"{self.num_ranks} ranks ({nodes} of {self.gpus_per_node})"


def topology_of(gpus: int, nodes: int) -> Topology:
    """`gpus` GPUs in all on `nodes` equal nodes. Raises InputError if they cannot be equal."""
    if gpus % nodes:
        raise InputError(
            f"--gpus {gpus}: cannot be spread evenly over {nodes} nodes; give a multiple of {nodes}"
        )
    return Topology(num_nodes=nodes, gpus_per_node=gpus // nodes)
