"""The slots of every expert, from the expert in every slot: the form of DeepSeek's EPLB.

Shapes: L MoE layers, E experts, P slots, X the most replicas of an expert.
"""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def logical_maps(
    slots: npt.NDArray[np.integer], num_experts: int, width: int = 1
) -> tuple[IntArray, IntArray]:
    """(logical_to_physical_map [L, E, X] padded with -1, expert_count [L, E]) of the map `slots` [L, P].

    X is the most replicas of an expert, or `width` if that is more. Slots [[1, 0, 1]] give
    [[[1, -1], [0, 2]]] and [[1, 2]].
    """
    count = np.stack([np.bincount(row, minlength=num_experts) for row in slots])
    order = np.argsort(slots, axis=1, kind="stable")
    expert = np.take_along_axis(slots, order, axis=1)
    first = np.cumsum(count, axis=1) - count
    nth = np.arange(slots.shape[1]) - np.take_along_axis(first, expert, axis=1)
    physical = np.full((*count.shape, max(width, count.max())), -1, dtype=np.int64)
    physical[np.arange(len(slots))[:, None], expert, nth] = order
    return physical, count
