"""Subjects of the study: models with the routing of several text domains, and a model in training."""

import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.routing.recorded import independent, read
from exflow.commands.profile import profile, windows_of_text
from exflow.errors import InputError
from exflow.model.checkpoint import Checkpoint as ModelFolder
from exflow.placement.plan.topology import Topology
from exflow.profiling.merge import merge, of_sequences
from exflow.profiling.trace import RoutingTrace
from exflow.texts import read_text
from exflow.train.corpus import split_held_out

DEMO = Path(__file__).parents[2] / "models" / "gpt-moe-demo"
EARLY = DEMO / "early-traces"
HELD_OUT = 0.05  # of every text, its end: configs/gpt-moe-demo.yaml trained on the rest
FINAL = "final"  # the step of the demo model itself
LENGTH, TOKENS = 512, 16_384  # of a sequence; of a domain

TEXTS = {
    "novels": ("gutenberg_middlemarch.txt", "gutenberg_moby_dick.txt", "gutenberg_war_and_peace.txt"),
    "speeches": ("nltk_inaugural.txt", "nltk_state_union.txt"),
    "drama": ("tinyshakespeare.txt",),
    "maths": ("gsm8k_train.txt",),
    "rust": ("rust_book.md",),
    "wikipedia": ("boolq_passages.txt", "wikitext2_valid.txt"),  # of this kind nothing was trained on ...
}
REFERENCE = "python"  # ... nor of the language reference, which Python ships

RECORDED = {"Mixtral-8x7B": 4, "gpt-oss-20b": 4, "DeepSeek-V2-Lite": 8}  # model -> GPUs


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the routing of its domains, and the GPUs that it is placed on."""

    name: str
    domains: dict[str, RoutingTrace]
    topology: Topology

    @property
    def trace(self) -> RoutingTrace:
        """The routing of all domains, one after the other."""
        return merge(list(self.domains.values()))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model in training: its routing after a number of steps, or at the end."""

    step: str
    trace: RoutingTrace


def demo_model(texts: Path, model: Path = DEMO, device: str = "cpu") -> Subject:
    """The demo model, or a checkpoint of its training, on text that it was not trained on.

    texts: the folder of the files in TEXTS. Raises InputError for a file that is missing or too short.
    """
    contents = {
        domain: [split_held_out(read_text(texts / name), HELD_OUT)[1] for name in names]
        for domain, names in TEXTS.items()
    }
    contents[REFERENCE] = list(topics.values())
    checkpoint = ModelFolder.open(model)
    tokenizer, decoder = checkpoint.tokenizer(), checkpoint.decoder(torch.device(device), torch.float32)
    domains = {
        domain: profile(decoder, windows_of_text(tokenizer, parts, LENGTH, TOKENS), path=None)
        for domain, parts in contents.items()
    }
    return Subject(model.name, domains, Topology(gpus_per_node=4))


def recorded_model(name: str, traces: Path) -> Subject:
    """A model of RECORDED, without what its sequences have in common.

    Raises InputError for a file that is missing or damaged.
    """
    domains = {domain: independent(found).trace for domain, found in read(traces, name).items()}
    return Subject(name, domains, Topology(gpus_per_node=RECORDED[name]))


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The traces step-NNNNNN in a folder, in order. Raises InputError where there are none."""
    found = {
        int(step[1]): path
        for path in sorted(folder.glob("step-*"))
        if (step := re.fullmatch(r"step-(\d+)", path.name))
    }
    if not found:
        raise InputError(f"{folder}: holds no traces step-000000, step-000050, ...; give a folder that does")
    return [Checkpoint(str(step), RoutingTrace.load(path)) for step, path in found.items()]


def folds(trace: RoutingTrace, count: int) -> list[npt.NDArray[np.int64]]:
    """The places of the trace's sequences, dealt into `count` parts of about equal size.

    Raises InputError where there are fewer sequences than parts.
    """
    sequences = len(np.unique(trace.sequence))
    if sequences < count:
        raise InputError(f"the trace has {sequences} sequence(s), {count} are needed; record more")
    return [np.arange(start, sequences, count) for start in range(count)]


def without(trace: RoutingTrace, places: npt.NDArray[np.int64]) -> RoutingTrace:
    """The trace's other sequences."""
    return of_sequences(trace, np.setdiff1d(np.arange(len(np.unique(trace.sequence))), places))
