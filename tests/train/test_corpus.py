"""Texts to token streams: which files, the split, the tokenizer."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from exflow.commands.generate_job import read_prompts
from exflow.errors import InputError
from exflow.model.tokenizer import END_OF_TEXT, SMALLEST_VOCABULARY, train_tokenizer
from exflow.texts import find_texts, read_text
from exflow.train.corpus import build_corpus, encode, split_held_out

LINES = [f"line {number} of the text\n" for number in range(100)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat\n" * 20], 300)


def test_files_and_folders_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.py", "sub/d.rst", "sub/e.bin", "f.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.txt").mkdir()
    binary = tmp_path / "sub" / "e.bin"
    found = find_texts([str(binary), str(tmp_path)])  # a file that is named is taken, whatever its ending
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["sub/e.bin", "a.md", "b.txt", "sub/c.py", "sub/d.rst"]


def test_the_standard_library() -> None:
    names = [path.as_posix() for path in find_texts(["{stdlib}"])]
    assert any(name.endswith("/json/decoder.py") for name in names)
    for left_out in ("pydoc_data", "test", "site-packages", "encodings"):
        assert not any(f"/{left_out}/" in name.split("/lib/")[-1] for name in names), left_out


def test_a_text_that_is_not_there() -> None:
    with pytest.raises(InputError) as error:
        find_texts(["{stdlib}", "no/such/book.txt"])
    assert str(error.value) == (
        "no/such/book.txt: no such text file or folder; give files, folders or {stdlib}"
    )


def test_a_folder_without_texts(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    with pytest.raises(InputError) as error:
        find_texts([str(tmp_path)])
    assert str(error.value) == f"no text found in {tmp_path}; give files ending in .txt, .md, .rst, .py"


MARK = b"\xef\xbb\xbf"
ONE_LINE = "\N{LINE SEPARATOR} \N{PARAGRAPH SEPARATOR} \x85 \f \v \x1c \x1d \x1e \r \N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ""),
        (MARK, ""),
        ("caf\xe9\n".encode(), "caf\xe9\n"),
        (MARK + "caf\xe9\n".encode(), "caf\xe9\n"),
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
        (b"one\n\r\ntwo", "one\n\ntwo"),
        ("模型\n".encode(), "模型\n"),
        (ONE_LINE.encode(), ONE_LINE),
        (b"a" + MARK, "a\N{ZERO WIDTH NO-BREAK SPACE}"),  # in the middle it is a character
    ],
)
def test_a_text_in_utf8(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert read_text(path) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("The text\n".encode("utf-16"), "it is UTF-16 text; save it as UTF-8, or give another"),
        ("The text\n".encode("utf-16-le"), "it is UTF-16 text; save it as UTF-8, or give another"),
        ("The text\n".encode("utf-16-be"), "it is UTF-16 text; save it as UTF-8, or give another"),
        ("模型的专家".encode("utf-16"), "it is UTF-16 text; save it as UTF-8, or give another"),
        ("The text\n".encode("utf-32"), "it is UTF-32 text; save it as UTF-8, or give another"),
        (
            "one\ncaf\xe9\n".encode("latin-1"),
            "line 2 is not UTF-8 (byte 0xe9); save the text as UTF-8, or give another",
        ),
        (
            "模型".encode("gb18030"),
            "line 1 is not UTF-8 (byte 0xd0); save the text as UTF-8, or give another",
        ),
        ("caf\xe9".encode()[:-1], "line 1 is not UTF-8 (byte 0xc3); save the text as UTF-8, or give another"),
        (
            b"\x1f\x8b\x08\x00" + bytes(20),
            "line 1 is not UTF-8 (byte 0x8b); save the text as UTF-8, or give another",
        ),
        (b"\x7fELF\x02\x01\x01\x00", "line 1 has a zero byte, so this is no text; give another"),
        (b"one\ntwo\0\n", "line 2 has a zero byte, so this is no text; give another"),
    ],
)
def test_what_is_no_text_in_utf8_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_text(path)
    assert str(error.value) == f"{path}: {expected}"
    with pytest.raises(
        InputError, match=re.escape(f"{path}: {expected}")
    ):  # training and profiling read it so
        build_corpus([path], 0.1, 300)


def test_a_text_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_text(tmp_path)
    assert str(error.value) == f"{tmp_path}: the text cannot be read (Is a directory); give another"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_prompt_is_a_line(tmp_path: Path, end: str) -> None:
    """Only a line's end ends it: other characters that Python's splitlines() heeds are a part of it."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(MARK + end.join(["one", "", ONE_LINE, "three", ""]).encode())
    assert read_prompts(["given"], path) == ["given", "one", ONE_LINE, "three"]


def test_a_prompt_that_is_not_utf8() -> None:
    in_c_locale = "na\udcc3\udcafve"
    assert read_prompts(["na\xefve", in_c_locale], None) == ["na\xefve"] * 2
    for prompt in ("caf\udce9", "\ud800", "\udcff\udcfe"):
        with pytest.raises(InputError, match="is not UTF-8; give it as UTF-8, or in a --prompt-file"):
            read_prompts([prompt], None)


def test_the_tail_is_held_out_from_a_line_end() -> None:
    train, held_out = split_held_out("".join(LINES), 0.1)
    assert train == "".join(LINES[:90])
    assert held_out == "".join(LINES[90:])


@given(st.text(alphabet="ab\n", max_size=40), st.floats(0.01, 0.49))
def test_the_two_parts_of_a_split_are_the_text(text: str, share: float) -> None:
    train, held_out = split_held_out(text, share)
    assert train + held_out == text
    if held_out:
        assert train.endswith("\n")
        assert len(held_out) >= share * len(text) - 1  # the line that the share begins in goes along
        assert "\n" not in text[len(train) : int(len(text) * (1 - share))]  # and no line more
    else:
        assert "\n" not in text[: int(len(text) * (1 - share))]


@given(st.text())
@settings(deadline=None)
def test_every_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids, default=0) < tokenizer.get_vocab_size()


def test_the_vocabulary_is_bytes_the_end_and_what_the_text_repeats(tokenizer: Tokenizer) -> None:
    assert train_tokenizer([], SMALLEST_VOCABULARY).get_vocab_size() == SMALLEST_VOCABULARY
    assert SMALLEST_VOCABULARY < tokenizer.get_vocab_size() <= 300
    assert len(tokenizer.encode("the cat sat").ids) < len("the cat sat")
    assert tokenizer.encode(END_OF_TEXT).ids == [tokenizer.token_to_id(END_OF_TEXT)]


def test_training_the_tokenizer_again_gives_the_same() -> None:
    texts = ["".join(LINES), "the cat sat on the mat\n" * 20]
    assert train_tokenizer(texts, 400).to_str() == train_tokenizer(texts, 400).to_str()


def test_each_text_of_a_stream_is_ended(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = encode(tokenizer, ["the cat", "", "sat"])
    assert stream.dtype == np.uint16
    expected = [*tokenizer.encode("the cat").ids, end, end, *tokenizer.encode("sat").ids, end]
    assert stream.tolist() == expected


def test_a_corpus_of_two_files(tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("".join(LINES))
    files[1].write_text("une phrase fran\N{LATIN SMALL LETTER C WITH CEDILLA}aise\n" * 10)
    corpus, tokenizer = build_corpus(files, held_out=0.1, vocab_size=320)
    decoded = [
        tokenizer.decode(stream.tolist(), skip_special_tokens=False).split(END_OF_TEXT)
        for stream in (corpus.train, corpus.held_out)
    ]
    assert decoded[0] == ["".join(LINES[:90]), files[1].read_text()[: 9 * 21], ""]
    assert decoded[1] == ["".join(LINES[90:]), files[1].read_text()[9 * 21 :], ""]
    assert corpus.held_out_bytes == sum(len(text.encode()) for text in decoded[1])


def test_the_tokenizer_does_not_see_what_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(LINES[:80]) + "zyzyzyzyzyzyzyzyzyzyzyzyzyzy\n" * 9)
    _, tokenizer = build_corpus([path], held_out=0.2, vocab_size=400)
    assert len(tokenizer.encode("zyzyzy").ids) == 6


@pytest.mark.parametrize("text", ["", "one line without an end", "one line\n"])
def test_texts_too_short_to_split(tmp_path: Path, text: str) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(text)
    for chosen, named in ((files[:1], files[0]), (files, f"{files[0]} and others")):
        with pytest.raises(InputError) as error:
            build_corpus(chosen, held_out=0.05, vocab_size=300)
        assert str(error.value) == f"{named}: too short to hold out a share of 0.05; give more text"
