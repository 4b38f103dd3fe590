"""Encodings of imported text: byte order marks are skipped, wide and packed files are named."""

import codecs
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from exflow.errors import InputError
from exflow.profiling.importers.loads import read_loads
from exflow.profiling.importers.registry import read_trace
from tests.profiling.responses import GOOD, HINTS, IDS, megatron

# Encodings.

TEXT_FILES = {
    "responses line": json.dumps(GOOD) + "\n",
    "responses lines": 2 * (json.dumps(GOOD) + "\n"),
    "responses indented": json.dumps([GOOD], indent=1),
    "responses windows": json.dumps([GOOD], indent=1).replace("\n", "\r\n"),
}
MEGATRON = "".join(json.dumps(record) + "\n" for record in megatron(0, IDS))


@pytest.mark.parametrize("text", [*TEXT_FILES.values(), MEGATRON])
def test_a_mark_of_utf8_changes_nothing(text: str, tmp_path: Path) -> None:
    path, plain = tmp_path / "a", tmp_path / "b"
    plain.write_text(text)
    for content in (codecs.BOM_UTF8 + text.encode(), codecs.BOM_UTF8 + b"\r\n" + text.encode()):
        path.write_bytes(content)
        for format in (None, "megatron" if text == MEGATRON else "responses"):
            trace = read_trace([path], format, HINTS)
            assert trace.digest() == read_trace([plain], hints=HINTS).digest()


def test_files_with_marks_that_were_joined(tmp_path: Path) -> None:
    part = codecs.BOM_UTF8 + json.dumps(GOOD).encode() + b"\n"
    (tmp_path / "a").write_bytes(part + part)
    assert read_trace([tmp_path / "a"], hints=HINTS).num_tokens == 16


@pytest.mark.parametrize("text", [*TEXT_FILES.values(), MEGATRON])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("format", [None, "responses", "megatron"])
def test_wide_encodings_are_named(text: str, encoding: str, format: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a"
    marks = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}
    for mark in (b"", marks.get(encoding, b"")):
        path.write_bytes(mark + text.encode(encoding))
        name = encoding[:6].upper()
        with pytest.raises(InputError) as caught:
            read_trace([path], format, HINTS)
        assert str(caught.value) == f"{path}: is {name} text; save it as UTF-8 (iconv -f {name} -t UTF-8)"


@pytest.mark.parametrize(("start", "name"), [(b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")])
def test_packed_files_are_named(start: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(start + bytes(100))
    with pytest.raises(InputError, match=rf"a: is packed by {name}; unpack it first"):
        read_trace([tmp_path / "a"])


@pytest.mark.parametrize("length", [0x7B, 0xFEFF, 0x227B])
def test_safetensors_whose_length_looks_like_a_mark(length: int, tmp_path: Path) -> None:
    header = json.dumps({"1_0": {"dtype": "I32", "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
    content = length.to_bytes(8, "little") + header.ljust(length) + np.array([3, 4], "<i4").tobytes()
    (tmp_path / "a").write_bytes(content)
    assert read_trace([tmp_path / "a"], hints=HINTS).experts.tolist() == [[[3, 4]]]


def test_marks_in_files_beside(tmp_path: Path) -> None:
    path = tmp_path / "rank0_raw.safetensors"
    path.write_bytes(save({"1_0": np.array([[3, 4]], np.int32)}))
    meta = tmp_path / "meta_info.json"
    meta.write_bytes(codecs.BOM_UTF8 + b'{"num_experts": 8}')
    assert read_trace([path]).num_experts == 8
    meta.write_bytes('{"num_experts": 8}'.encode("utf-16"))
    with pytest.raises(
        InputError, match=r"meta_info\.json is not valid JSON \(it is UTF-16 text; save it as"
    ):
        read_trace([path])
    (tmp_path / "loads.json").write_bytes(codecs.BOM_UTF8 + b"[[1, 2]]")
    assert read_loads(tmp_path / "loads.json").tolist() == [[1, 2]]
