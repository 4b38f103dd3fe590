"""Choice of the device and dtype to compute on."""

import torch

from exflow.errors import InputError


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; without a name a GPU if there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is unknown; give cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no CUDA GPU; give cpu, or install a CUDA build of torch")
    return torch.device(name)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_named(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; give {' or '.join(DTYPES)}")
    return DTYPES[name]
