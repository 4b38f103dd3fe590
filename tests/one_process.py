"""The oracle of jobs of several ranks: the same model in one process."""

from pathlib import Path

from exflow.model.checkpoint import Checkpoint
from exflow.runtime.deploy import load_model
from exflow.runtime.request import Request


def tokens_of_one_process(model: Path, prompts: list[str], new_tokens: int) -> list[list[int]]:
    """Generate greedily, past the end of text."""
    encodings = Checkpoint.open(model).tokenizer().encode_batch(prompts)
    return load_model(model).generate(Request([each.ids for each in encodings], new_tokens)).tokens
