"""Conversion of texts to token streams, with the tail of each file held out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from exflow.errors import InputError
from exflow.model.tokenizer import END_OF_TEXT, train_tokenizer
from exflow.texts import read_text


@dataclass(frozen=True)
class Corpus:
    """Token streams for training and evaluation: files in order, each ended by the end-of-text token.

    held_out_bytes: size of the held-out text in UTF-8.
    """

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    held_out_bytes: int


def split_held_out(text: str, share: float) -> tuple[str, str]:
    """Cut off the last `share` of a text, at the line end before it; a text without line ends stays whole."""
    cut = text.rfind("\n", 0, int(len(text) * (1 - share))) + 1 or len(text)
    return text[:cut], text[cut:]


def encode(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.uint16]:
    """The texts as one stream, each ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    streams = [np.array([*encoding.ids, end], np.uint16) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(streams)


def build_corpus(files: list[Path], held_out: float, vocab_size: int) -> tuple[Corpus, Tokenizer]:
    """Read, split each file, train the tokenizer on the training part, encode both parts."""
    parts = [split_held_out(read_text(file), held_out) for file in files]
    train_texts = [train for train, _ in parts if train]
    held_out_texts = [held for _, held in parts if held]
    if not train_texts or not held_out_texts:
        raise InputError(
            f"{files[0]}{' and others' if files[1:] else ''}: too short to hold out a share of {held_out}; "
            "give more text"
        )
    tokenizer = train_tokenizer(train_texts, vocab_size)
    size = sum(len(text.encode()) for text in held_out_texts)
    return Corpus(encode(tokenizer, train_texts), encode(tokenizer, held_out_texts), size), tokenizer
