"""Recorded routing as the benchmarks read it: which files make a model, and what no split has on both sides.

The files are .npz that `exflow import` reads. Some say besides, by token, `group`: the conversation whose
turn the sequence is; or, by sequence, `seq_repetition`: whether it loops.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.profiling.importers.registry import read_trace
from exflow.profiling.merge import merge, of_sequences
from exflow.profiling.trace import RoutingTrace

MODELS = {  # model -> a file for each domain
    "Mixtral-8x7B": {
        "coding": "mixtral8x7b_coding.npz",
        "humanities": "mixtral8x7b_humanities.npz",
        "maths": "mixtral8x7b_math.npz",
        "roleplay": "mixtral8x7b_roleplay.npz",
    },
    "gpt-oss-20b": {
        "GPQA": "gptoss20b_gpqa_main.npz",
        "MMLU": "gptoss20b_mmlu_validation.npz",
        "MMLU_Pro": "gptoss20b_mmlu_pro_validation.npz",
    },
    "DeepSeek-V2-Lite": {"intent": "esft_dsv2lite_intent.npz", "law": "esft_dsv2lite_law.npz"},
}


class NoTrace(InputError):
    """A file of recorded routing is not there."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """Routing, with what is known of its sequences 0, 1, ..., each [sequences]."""

    trace: RoutingTrace
    group: npt.NDArray[np.int64]  # numbered 0, 1, ... too; a split keeps a group whole
    loops: npt.NDArray[np.bool_]

    @property
    def unit(self) -> npt.NDArray[np.int64]:
        """[tokens]: the group of each token."""
        return self.group[self.trace.sequence]

    @property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """[tokens] bool: True for every fourth group, the quarter that plans are judged by."""
        return np.equal(self.unit % 4, 3)


def read(folder: Path, model: str, domains: Sequence[str] = ()) -> dict[str, Recorded]:
    """These domains of a model, or all, as they were recorded.

    Raises NoTrace if the folder lacks a file of theirs, InputError for one that is damaged.
    """
    files = {domain: folder / MODELS[model][domain] for domain in domains or MODELS[model]}
    for file in files.values():
        if not file.is_file():
            raise NoTrace(f"{file.name}: not in {folder.name}; give the folder of the recorded routing")
    return {domain: as_recorded(file) for domain, file in files.items()}


def as_recorded(file: Path) -> Recorded:
    """Read everything that a file holds. Raises InputError where it is damaged."""
    trace = read_trace([file])
    with np.load(file, allow_pickle=False) as archive:
        _, first = np.unique(archive["seq"], return_index=True)
        names = archive.get("group", archive["seq"])[first]
        loops = archive.get("seq_repetition", np.zeros(len(first), dtype=bool))
    return Recorded(trace, np.unique(names, return_inverse=True)[1], loops)


def each_alone(trace: RoutingTrace) -> Recorded:
    """The trace with every sequence in a group of its own."""
    sequences = len(np.unique(trace.sequence))
    return Recorded(trace, np.arange(sequences), np.zeros(sequences, dtype=bool))


def joined(parts: Iterable[Recorded]) -> Recorded:
    """Join the parts one after the other, sequences and groups numbered on."""
    parts = list(parts)
    firsts = np.cumsum([0, *(part.group.max() + 1 for part in parts)])
    return Recorded(
        merge([part.trace for part in parts]),
        np.concatenate([part.group + first for part, first in zip(parts, firsts, strict=False)]),
        np.concatenate([part.loops for part in parts]),
    )


def independent(recorded: Recorded) -> Recorded:
    """The recording without what its sequences share: sequences that loop, sequences that another repeats (of
    a group the last one holds them all), and the prompt that all begin with."""
    last = np.append(np.diff(recorded.group) != 0, True)
    kept = of_sequences(recorded.trace, np.flatnonzero(last & ~recorded.loops))
    return each_alone(without_common_prompt(kept))


def without_common_prompt(trace: RoutingTrace) -> RoutingTrace:
    """The rows after the last position at which more than half of the sequences route exactly alike.

    Else a plan would be judged by tokens that it has seen, whatever sequences are held out.
    """
    rows = np.column_stack([trace.position, trace.experts.reshape(trace.num_tokens, -1)])
    _, kind, times = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    alike = times[kind] > max(1.0, len(np.unique(trace.sequence)) / 2)
    return numbered(trace.select(trace.position > trace.position[alike].max(initial=-1)))


def numbered(trace: RoutingTrace) -> RoutingTrace:
    """The trace with its sequences numbered 0, 1, ... without gaps."""
    return of_sequences(trace, np.arange(len(np.unique(trace.sequence))))
