"""Checks of a plan's arrays; each raises InputError that names the key and the remedy."""

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError

IntArray = npt.NDArray[np.integer]


def check_layers(moe_layer_ids: tuple[int, ...], num_hidden_layers: int) -> None:
    ascending = moe_layer_ids and list(moe_layer_ids) == sorted(set(moe_layer_ids))
    if not ascending or moe_layer_ids[0] < 0 or moe_layer_ids[-1] >= num_hidden_layers:
        raise InputError(
            f"moe_layer_ids: are {list(moe_layer_ids)} in a model of {num_hidden_layers} hidden layers; "
            "give ascending indices of hidden layers, at least one"
        )


def check_shape(key: str, array: IntArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{key}: has the shape {array.shape} instead of {shape}; place again on this trace")


def check_every_expert_placed(layer: int, row: IntArray, num_experts: int) -> None:
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


def check_served(serving_rank: IntArray, hosts: npt.NDArray[np.bool_]) -> None:
    """Raise InputError unless every serving rank [L, E, G] has a replica, and is 0 where a layer lacks e."""
    lacks = ~hosts.any(axis=2, keepdims=True)
    known = (serving_rank >= 0) & (serving_rank < hosts.shape[2])
    served = np.take_along_axis(hosts, np.where(known, serving_rank, 0), axis=2)
    wrong = np.argwhere(~((known & served) | (lacks & (serving_rank == 0))))
    if len(wrong):
        layer, expert, owner = wrong[0].tolist()
        raise InputError(
            f"serving_rank[{layer}][{expert}][{owner}]: is {serving_rank[layer, expert, owner]}, a rank "
            f"without expert {expert}; name a rank that holds it, or place again"
        )


def check_equal_shares(rank_of_expert: IntArray, num_ranks: int) -> None:
    num_experts = rank_of_expert.shape[1]
    for layer, ranks in enumerate(rank_of_expert):
        shares = [int((ranks == rank).sum()) for rank in range(num_ranks)]
        if [share * num_ranks for share in shares] != [num_experts] * num_ranks:
            raise InputError(
                f"rank_of_expert[{layer}]: gives the ranks {shares} of {num_experts} experts; "
                f"give each of the {num_ranks} ranks the same number"
            )
