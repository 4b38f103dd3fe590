"""Texts on disk to token streams: which files, the byte-level BPE, the held-out tail."""

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from exflow.encodings import utf8_text
from exflow.errors import InputError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the bytes and the end of text
LARGEST_VOCABULARY = 1 << 16  # token streams are uint16
SUFFIXES = (".txt", ".md", ".rst", ".py")
# pydoc_data (the language reference as text) stays unseen: the demo profiles text the model never read
STDLIB_LEFT_OUT = (
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "encodings",
)


@dataclass(frozen=True)
class Corpus:
    """Token streams; files joined in order, each ended by the end-of-text token."""

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    held_out_bytes: int


def find_texts(names: list[str]) -> list[Path]:
    """Files and folders (searched for .txt, .md, .rst, .py); "{stdlib}" is the standard library's sources."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if name == "{stdlib}":
            files += _stdlib_sources()
        elif path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{name}: no such text file or folder; give files, folders or {{stdlib}}")
    if not files:
        raise InputError(f"no text found in {', '.join(names)}; give files ending in {', '.join(SUFFIXES)}")
    return files


def _stdlib_sources() -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders).difference(STDLIB_LEFT_OUT)  # os.walk then enters these alone
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. A byte-order mark is no part of it, and a line ends with \\n alone.

    Raises InputError, which says what the file is, for any other encoding and for binary files.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the text cannot be read ({error.strerror}); give another") from error
    try:
        text = utf8_text(content)
    except UnicodeDecodeError as error:
        line, byte = 1 + content.count(b"\n", 0, error.start), content[error.start]
        raise InputError(
            f"{path}: line {line} is not UTF-8 (byte 0x{byte:02x}); save the text as UTF-8, or give another"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: {error}, or give another") from error
    if "\0" in text:
        line = 1 + content.count(b"\n", 0, content.index(b"\0"))
        raise InputError(f"{path}: line {line} has a zero byte, so this is no text; give another")
    return text.replace("\r\n", "\n")


def split_held_out(text: str, share: float) -> tuple[str, str]:
    """Cut off the last `share` of a text, at the line end before it; a text without one stays whole."""
    cut = text.rfind("\n", 0, int(len(text) * (1 - share))) + 1 or len(text)
    return text[:cut], text[cut:]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text can be encoded, nothing is unknown.

    vocab_size, at least SMALLEST_VOCABULARY, is an upper bound: a short text has fewer pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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
