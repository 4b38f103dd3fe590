"""Tokenizers: training one, reading that of a checkpoint folder, and the tokens that end a text."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from exflow.errors import InputError
from exflow.files import read_json
from exflow.model.config_file import CONFIG, OWN, REMEDY, load_model_config, read_config

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the bytes and the end of text
LARGEST_VOCABULARY = 1 << 16  # token streams are uint16
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


def load_tokenizer(folder: Path) -> Tokenizer:
    """As read_tokenizer, of a model that is known. Raises InputError if it does not fit the model.

    Added tokens may lie beyond the model's vocabulary: prompts that have them are refused.
    """
    tokenizer = read_tokenizer(folder)
    known = load_model_config(folder).vocab_size
    last = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if last >= known:
        raise InputError(
            f"{folder / TOKENIZER}: has token {last}, the model's vocab_size is {known}: it belongs to "
            "another model; copy this model's there"
        )
    return tokenizer


def end_tokens(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text: our own model's end of text, or those that a Hugging Face folder names.

    Some folders name a number beyond the vocabulary, for no token: it is left out.
    """
    config, model_type = read_config(folder)
    if model_type == OWN:
        end = tokenizer.token_to_id(END_OF_TEXT)
        return () if end is None else (end,)
    path = folder / GENERATION_CONFIG
    named = read_json(path, "generation configuration", REMEDY) if path.is_file() else {}
    for found, source in ((named, path), (config, folder / CONFIG)):
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
    """Those of `added_tokens_decoder` that the tokenizer lacks, in the order of their ids."""
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
