"""Reads files of torch.save without running code in them and without trusting their sizes."""

import ctypes
import mmap
import zipfile
from pathlib import Path
from typing import Any

import numpy.typing as npt

from exflow.profiling.importers.foreign import parsing


def load_torch(path: Path, remedy: str) -> Any:
    """The object in a .pt file, its tensors mapped, so that they take memory only as they are read.

    Nothing but tensors, containers, numbers and strings is made (weights_only). Raises InputError for
    anything else, for damage, for the format before torch 1.6, and for an archive that unfolds to more than
    it holds.
    """
    import torch  # slow to load, and only this needs it

    with parsing(path, remedy):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # torch never compresses
                    raise ValueError(f"{member.filename[:40]} is compressed: not of torch.save")
                if member.file_size > path.stat().st_size:
                    raise ValueError(f"{member.filename[:40]} declares {member.file_size} bytes")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def let_go(array: npt.NDArray[Any]) -> None:
    """Give back the pages of a contiguous array of a mapped file; they are read again if they are touched."""
    page = mmap.PAGESIZE
    first = -(-array.ctypes.data // page) * page
    size = (array.ctypes.data + array.nbytes) // page * page - first
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
