"""Link matrix that `nvidia-smi topo -m` prints, read as bandwidths between GPUs (docs/topology.md)."""

import math
import re
import reprlib
from itertools import takewhile

from exflow.errors import InputError

MAX_NVLINKS = 18
NVLINK_GB_S = 25.0  # of one link, each way: NVLink 2, 3 and 4
PCIE_GB_S = {"PIX": 24.0, "PXB": 22.0, "PHB": 20.0, "NODE": 16.0, "SYS": 10.0}  # PCIe 4.0 with 16 lanes
BANDWIDTH_GB_S = {
    "X": math.inf,  # the GPU itself
    **{f"NV{links}": links * NVLINK_GB_S for links in range(1, MAX_NVLINKS + 1)},
    **PCIE_GB_S,
}

_STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\[[0-9;]*m")  # the header is underlined; web pages lose ESC
_GPU = re.compile(r"GPU[0-9]+")
# A row, the header or the legend. Blanks of one line only: over many lines the search would be quadratic.
_MATRIX = re.compile(r"^[^\S\n]*(GPU[0-9]+[^\S\n]+[A-Za-z]|NV#[^\S\n]*=)", re.MULTILINE)
_AFFINITY = ("CPU", "NUMA", "GPU")  # first words of the columns behind the devices
_REMEDY = "save the whole output of nvidia-smi topo -m again"


def is_link_matrix(text: str) -> bool:
    """Whether the text looks like output of `nvidia-smi topo -m`, complete or not."""
    return bool(_MATRIX.search(_STYLE.sub("", text)))


def link_bandwidths(text: str) -> list[list[float]]:
    """[gpus][gpus]: GB/s each way by BANDWIDTH_GB_S, infinite on the diagonal.

    Raises InputError, which does not name the file, where the matrix is incomplete or a link is unknown.
    """
    lines = [line.split() for line in _STYLE.sub("", text).splitlines()]
    header, *rows = [words for words in lines if words and _GPU.fullmatch(words[0])] or [[]]
    columns = list(takewhile(lambda word: word not in _AFFINITY, header))
    gpus = list(takewhile(_GPU.fullmatch, columns))
    if not gpus:
        raise InputError(f"holds no column GPU0; {_REMEDY}")
    if any(word in BANDWIDTH_GB_S for word in columns):
        raise InputError(f"{' '.join(header[:3])} stands where the names of the columns should; {_REMEDY}")
    names = [row[0] for row in rows]
    if names != gpus:
        raise InputError(f"has columns {reprlib.repr(gpus)}, but rows {reprlib.repr(names)}; {_REMEDY}")
    links = [_links(row, gpus, len(columns)) for row in rows]
    _check_pairs(links, gpus)
    return [[BANDWIDTH_GB_S[link] for link in row] for row in links]


def _links(row: list[str], gpus: list[str], num_columns: int) -> list[str]:
    """Links of one GPU to every GPU; those to network cards are left out."""
    name, *cells = row
    known = list(takewhile(BANDWIDTH_GB_S.__contains__, cells))
    unknown = cells[len(known)] if len(known) < len(cells) else ""
    if len(known) < len(gpus) and unknown[:1].isalpha() and unknown != "N/A":  # not an affinity, as 0-31
        raise InputError(
            f"{name} to {gpus[len(known)]} is {unknown!r}; give X, NV1 to NV{MAX_NVLINKS}, "
            f"{', '.join(PCIE_GB_S)}"
        )
    if not len(gpus) <= len(known) <= num_columns:
        raise InputError(f"the row {name} has {len(known)} links for {num_columns} columns; {_REMEDY}")
    return known[: len(gpus)]


def _check_pairs(links: list[list[str]], gpus: list[str]) -> None:
    """InputError unless X stands on the diagonal alone, and both ways of a pair have the same link."""
    for row, (one, found) in enumerate(zip(gpus, links, strict=True)):
        for column, (other, link) in enumerate(zip(gpus, found, strict=True)):
            if (link == "X") != (row == column):
                raise InputError(f"{one} to {other} is {link}; {_REMEDY}")
            if link != links[column][row]:
                raise InputError(
                    f"{one} to {other} is {link}, but {links[column][row]} the other way; {_REMEDY}"
                )
