"""Information between experts, in bits, from counts: Shannon's entropy and mutual information."""

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.integer]
Bits = npt.NDArray[np.float64]


def entropy(counts: Counts) -> Bits:
    """[...]: entropy in bits along the last axis of counts [..., E], of which no row may be all zero."""
    share = counts / counts.sum(axis=-1, keepdims=True)
    return np.asarray(-(share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=-1))


def mutual_information(joint: Counts) -> Bits:
    """[...]: bits that the row says about the column, from counts of both together [..., E, F].

    This is the plug-in estimate: of N independent pairs it is not 0 but about (E - 1) (F - 1) / (2 N ln 2).
    """
    together = entropy(joint.reshape(*joint.shape[:-2], -1))
    return np.asarray(entropy(joint.sum(axis=-1)) + entropy(joint.sum(axis=-2)) - together)
