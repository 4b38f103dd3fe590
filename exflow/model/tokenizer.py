"""Tokenizers: training, reading from a checkpoint folder, and the tokens that end a text."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from exflow.errors import InputError
from exflow.files import read_json
from exflow.model.config_file import CONFIG, REMEDY

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the bytes and the end of text
LARGEST_VOCABULARY = 1 << 16  # token streams are uint16
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> None:
    """Raise InputError if the tokenizer of `folder` does not fit a model with this vocabulary.

    Added tokens may lie beyond the vocabulary: prompts that contain them are refused.
    """
    last = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if last >= vocab_size:
        raise InputError(
            f"{folder / TOKENIZER}: has token {last}, the model's vocab_size is {vocab_size}: it belongs to "
            "another model; copy this model's there"
        )


def end_tokens(folder: Path, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Ids of the tokens that end a text.

    settings: the `config.json` of a Hugging Face folder; None for a model of our own, which has one end
    token. Some folders name an id beyond the vocabulary, which no token has; it is ignored.
    """
    if settings is None:
        end = tokenizer.token_to_id(END_OF_TEXT)
        return () if end is None else (end,)
    path = folder / GENERATION_CONFIG
    named = read_json(path, "generation configuration", REMEDY) if path.is_file() else {}
    for found, source in ((named, path), (settings, folder / CONFIG)):
        ends = found.get("eos_token_id") if isinstance(found, dict) else None
        if ends is not None:
            return tuple(end for end in _token_ids(ends, source) if 0 <= end < vocab_size)
    return ()


def _token_ids(value: Any, source: Path) -> list[int]:
    values = value if isinstance(value, list) else [value]
    if not all(type(each) is int for each in values):  # true is no token
        raise InputError(f"{source}: eos_token_id {values} is no list of token ids; {REMEDY}")
    return values


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json` of a folder. Raises InputError if it is missing or malformed.

    Truncation, padding and dropout that a training or calibration tool left in the file are not applied: they
    would change prompts. Tokens that only `tokenizer_config.json` has are added, as transformers does.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer; {REMEDY}")
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise InputError(f"{path}: not a tokenizer ({error}); {REMEDY}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    _add_tokens(tokenizer, folder / TOKENIZER_CONFIG)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, settings: Path) -> None:
    """Add the tokens of `added_tokens_decoder` that the tokenizer lacks, in the order of their ids."""
    named = read_json(settings, "tokenizer's configuration", REMEDY) if settings.is_file() else {}
    decoder = named.get("added_tokens_decoder") if isinstance(named, dict) else None
    if not isinstance(decoder, dict):
        return
    for number in sorted((each for each in decoder if each.isdecimal()), key=int):
        token = decoder[number]
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or tokenizer.token_to_id(content) is not None:
            continue
        flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        tokenizer.add_tokens([AddedToken(content, **flags, special=bool(token.get("special")))])
        if tokenizer.token_to_id(content) != int(number):
            raise InputError(
                f"{settings}: added_tokens_decoder has {content!r} as token {number}, where {TOKENIZER} has "
                f"no place for it; {REMEDY}"
            )


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE, which can encode every text.

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
