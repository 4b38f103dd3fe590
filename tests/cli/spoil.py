"""Ways to spoil the inputs of a command."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from exflow.profiling.trace import RoutingTrace

Edit = Callable[[Path], None]


def replace_in(name: str, old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit


def truncate(pattern: str) -> Edit:
    def edit(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return edit


def remove(pattern: str) -> Edit:
    def edit(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        path.unlink()

    return edit


def write_object_array(folder: Path) -> None:
    np.save(folder / "pickle.npy", np.array([{1: 2}], dtype=object), allow_pickle=True)


def write_wide_ids(folder: Path) -> None:
    np.savez(folder / "wide.npz", experts=np.array([[[300]]]), num_experts=8)


def write_other_trace(folder: Path) -> None:
    routing = np.random.default_rng(0).integers(0, 4, (40, 4, 1))
    RoutingTrace.from_arrays(routing, num_experts=4, sequence=np.arange(40) // 10).save(folder / "other")


def write_topology(text: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "cluster.yaml").write_text(text)

    return edit


def nothing(folder: Path) -> None:
    """The input is bad without any change."""
