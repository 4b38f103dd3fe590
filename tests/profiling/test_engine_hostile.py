"""Hostile and damaged files of the engines: pickles, bombs, endless lines, flipped bytes."""

import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.profiling.importers import json_values
from exflow.profiling.importers.registry import FORMATS, read_trace
from tests.payload import Payload
from tests.profiling.engine_files import GOLDEN, SHAPE, dump, lines, npy_header, one

# Files that would harm.


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("kind", ["protocol 0", "protocol 5", "torch", "old torch", "in a record"])
def test_a_pickle_in_disguise(format: str | None, kind: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "exploded", tmp_path / "a_0.pt"
    if kind.startswith("protocol"):
        path.write_bytes(pickle.dumps({"records": Payload(mark)}, int(kind[-1])))
    elif kind == "in a record":
        dump(path, [one(misc_objects=[Payload(mark)])])
    else:
        torch.save({"records": Payload(mark)}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        read_trace([path], format)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_archives_that_unfold(tmp_path: Path) -> None:
    bomb = tmp_path / "a.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        shape = (40_000_000, 2)
        archive.writestr("experts.npy", npy_header(shape) + bytes(shape[0] * shape[1]))
    with pytest.raises(
        InputError, match=r"a\.npz: experts: declares 80000000 bytes in \d+, more than ids com"
    ):
        read_trace([bomb])
    lie = tmp_path / "b.npz"
    with zipfile.ZipFile(lie, "w") as archive:
        archive.writestr("experts.npy", npy_header((10**9, 100)))
    with pytest.raises(
        InputError, match=r"b\.npz: cannot be read \(the header declares 100000000000 bytes of"
    ):
        read_trace([lie])
    whole = dump(tmp_path / "a_0.pt", [one()])
    packed = tmp_path / "b_0.pt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(InputError, match=r"b_0\.pt: cannot be read \(.* is compressed: not of torch\.save\)"):
        read_trace([packed])


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "MAX_BYTES", 100)
    path = lines(tmp_path / "a.jsonl", [{"a": "x" * 200}])
    with pytest.raises(
        InputError, match=r"a\.jsonl: a line has more than 100 bytes; write one response a lin"
    ):
        read_trace([path])
    path.write_text("{\n" + '"a": 1,\n' * 20)
    with pytest.raises(InputError, match=r"a\.jsonl: has more than 100 bytes; write one response a line \(J"):
        read_trace([path])


GOLDEN_FILES = {
    "sglang": "expert_distribution_recorder_1_0.pt",
    "responses": "vllm.json",
    "npy": "routed_experts.npy",
    "trtllm": "trtllm/rank0_raw.safetensors",
    "megatron": "router_trace_rank0.jsonl",
}


@pytest.mark.parametrize("format", GOLDEN_FILES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_input_error_or_another_trace(format: str, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray((GOLDEN / GOLDEN_FILES[format]).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    for name in (format, None):
        try:
            trace = read_trace([path], name, hints=SHAPE)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
        else:
            assert trace.num_tokens
