"""GPUs and the links between them: nodes, GPUs in each node, and the cost of a message between two GPUs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError

# What a message between nodes costs where no links are given, in messages inside a node: NVLink carries about
# 400 GB/s from each GPU, a network card 50.
INTER_NODE_COST = 8.0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Equal nodes of `gpus_per_node` GPUs; node n holds the ranks n * gpus_per_node and up.

    link_cost   [num_ranks][num_ranks] what a message between two ranks costs: symmetric, zero on the diagonal
                and positive elsewhere; by default 1 inside a node and INTER_NODE_COST between nodes

    Raises InputError where a count is below 1 or the costs break these rules.
    """

    num_nodes: int = 1
    gpus_per_node: int
    link_cost: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name, count in (("num_nodes", self.num_nodes), ("gpus_per_node", self.gpus_per_node)):
            if count < 1:
                raise InputError(f"topology: {name} is {count}; it must be at least 1")
        if self.link_cost is not None:
            _check_costs(self.link_cost, self.num_ranks)

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def node_of_rank(self) -> npt.NDArray[np.int64]:
        """[num_ranks] int64: the node of each rank."""
        return np.arange(self.num_ranks) // self.gpus_per_node

    @property
    def distance(self) -> npt.NDArray[np.float64]:
        """[num_ranks, num_ranks] float64: cost of a message, in units of the cheapest link."""
        node = self.node_of_rank
        cost = np.where(node[:, None] == node, 1.0, INTER_NODE_COST)
        if self.link_cost is not None:
            cost = np.array(self.link_cost)
        np.fill_diagonal(cost, 0)
        cheapest = cost[cost > 0].min() if self.num_ranks > 1 else 1.0
        return np.asarray(cost / cheapest, dtype=np.float64)

    @property
    def slowness(self) -> npt.NDArray[np.float64]:
        """[num_ranks, num_ranks] float64: cost of a message over that of the cheapest pair of its class, one
        class inside nodes and one between; 1 where no costs are given."""
        if self.link_cost is None:
            return np.ones((self.num_ranks, self.num_ranks))
        cost, node = np.array(self.link_cost), self.node_of_rank
        near = node[:, None] == node
        for pairs in (near & (cost > 0), ~near):
            if pairs.any():
                cost[pairs] /= cost[pairs].min()
        return cost

    def __str__(self) -> str:
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        return f"{self.num_ranks} ranks ({nodes} of {self.gpus_per_node})"


def topology_of(gpus: int, nodes: int) -> Topology:
    """`gpus` GPUs in all on `nodes` equal nodes. Raises InputError if they cannot be equal."""
    if gpus % nodes:
        raise InputError(
            f"{gpus} GPUs cannot be spread evenly over {nodes} nodes; give a multiple of {nodes}"
        )
    return Topology(num_nodes=nodes, gpus_per_node=gpus // nodes)


def _check_costs(cost: tuple[tuple[float, ...], ...], num_ranks: int) -> None:
    if len(cost) != num_ranks or any(len(row) != num_ranks for row in cost):
        raise InputError(
            f"topology: link_cost is not {num_ranks} rows of {num_ranks}; give one for each rank"
        )
    price = np.array(cost, dtype=np.float64)  # millions of pairs: not one by one
    fair = np.isfinite(price) & (price > 0)
    np.fill_diagonal(fair, np.diagonal(price) == 0)
    wrong = np.argwhere(~fair | (price != price.T))
    if len(wrong):
        one, other = wrong[0].tolist()
        if not fair[one, other]:
            raise InputError(
                f"topology: link_cost[{one}][{other}] is {cost[one][other]}; "
                "give 0 on the diagonal and a positive number elsewhere"
            )
        raise InputError(
            f"topology: link_cost[{one}][{other}] is {cost[one][other]}, but {cost[other][one]} the other "
            "way; give both ways the same cost"
        )
