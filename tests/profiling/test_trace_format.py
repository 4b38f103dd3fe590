"""The bytes of a trace (docs/trace-format.md), and what a reader says of bytes that are wrong."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exflow.errors import InputError
from exflow.profiling.trace import RoutingTrace

INDEX = """{
 "format": "exflow-trace",
 "version": 1,
 "model": "tiny",
 "num_hidden_layers": 4,
 "moe_layer_ids": [
  1,
  3
 ],
 "num_experts": 4,
 "top_k": 2,
 "dtype": "uint8",
 "has_weights": false,
 "shards": [
  {
   "file": "shard-00000.safetensors",
   "num_tokens": 3
  }
 ]
}
"""
HEADER = (
    '{"position":{"dtype":"I32","shape":[3],"data_offsets":[0,12]},'
    '"sequence":{"dtype":"I32","shape":[3],"data_offsets":[12,24]},'
    '"experts":{"dtype":"U8","shape":[3,2,2],"data_offsets":[24,36]},'
    '"phase":{"dtype":"U8","shape":[3],"data_offsets":[36,39]}}'
)
DATA = """
    00 00 00 00  01 00 00 00  00 00 00 00
    00 00 00 00  00 00 00 00  01 00 00 00
    00 03 02 01  01 00 03 02  02 03 00 01
    00 01 00
"""
SHARD = b"\xf8" + bytes(7) + HEADER.encode().ljust(248) + bytes.fromhex(DATA)
DIGEST = "efda87843e06290e6808026bf8cd8996a67fdfd5d32dffb586acb933599c38d7"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    folder = tmp_path / "golden"
    folder.mkdir()
    (folder / "index.json").write_text(INDEX, encoding="utf-8")
    (folder / "shard-00000.safetensors").write_bytes(SHARD)
    return folder


def tiny() -> RoutingTrace:
    return RoutingTrace.from_arrays(
        [[[0, 3], [2, 1]], [[1, 0], [3, 2]], [[2, 3], [0, 1]]],
        num_experts=4,
        sequence=[0, 0, 1],
        phase=[0, 1, 0],
        model="tiny",
        moe_layer_ids=(1, 3),
        num_hidden_layers=4,
    )


def test_the_golden_bytes_are_read(golden: Path) -> None:
    trace = RoutingTrace.load(golden)
    assert trace.digest() == tiny().digest() == DIGEST
    assert trace.layout == tiny().layout


def test_the_golden_bytes_are_written(tmp_path: Path) -> None:
    tiny().save(tmp_path / "t")
    assert (tmp_path / "t/index.json").read_text(encoding="utf-8") == INDEX
    assert (tmp_path / "t/shard-00000.safetensors").read_bytes() == SHARD


def test_the_document_shows_the_golden_bytes() -> None:
    text = (Path(__file__).parents[2] / "docs/trace-format.md").read_text(encoding="utf-8")
    flat = " ".join(text.split())
    assert " ".join(INDEX.split()) in flat
    assert HEADER in text
    assert DIGEST in text
    for line in DATA.strip().splitlines():
        assert line.strip() in text


def test_where_layers_differ_the_index_and_the_digest_say_so(tmp_path: Path) -> None:
    """The golden trace but for one id, so that MoE layer 1 gets along with three experts."""
    index = INDEX.replace(' "top_k"', ' "experts_per_layer": [\n  4,\n  3\n ],\n "top_k"')
    data = bytes.fromhex(DATA.replace("03 02  02 03", "00 02  02 03"))
    metadata = (
        '[{"model": "tiny", "num_hidden_layers": 4, "moe_layer_ids": [1, 3], "num_experts": 4, "top_k": 2, '
        '"experts_per_layer": [4, 3]}, ["experts", "phase", "position", "sequence"]]'
    )
    trace = RoutingTrace.from_arrays(
        [[[0, 3], [2, 1]], [[1, 0], [0, 2]], [[2, 3], [0, 1]]],
        num_experts=4,
        sequence=[0, 0, 1],
        phase=[0, 1, 0],
        model="tiny",
        moe_layer_ids=(1, 3),
        num_hidden_layers=4,
        experts_per_layer=(4, 3),
    )
    trace.save(tmp_path / "t")
    assert (tmp_path / "t/index.json").read_text(encoding="utf-8") == index
    assert (tmp_path / "t/shard-00000.safetensors").read_bytes() == SHARD[:256] + data
    loaded = RoutingTrace.load(tmp_path / "t")
    assert loaded.layout == trace.layout
    by_name = data[24:] + data[:24]  # experts, phase, position, sequence
    digest = hashlib.sha256(metadata.encode() + by_name).hexdigest()
    assert loaded.digest() == trace.digest() == digest


def test_any_order_of_tensors_is_read(golden: Path) -> None:
    """Readers go by the header: here a metadata entry and an odd data offset, which nothing forbids."""
    entries = json.loads(HEADER)
    for entry in entries.values():
        entry["data_offsets"] = [offset + 1 for offset in entry["data_offsets"]]
    header = json.dumps({"__metadata__": {"by": "hand"}} | entries).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0" + SHARD[256:]
    (golden / "shard-00000.safetensors").write_bytes(content)
    assert RoutingTrace.load(golden).digest() == DIGEST


def edit_index(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "index.json").write_text(json.dumps(json.loads(INDEX) | changes), encoding="utf-8")

    return damage


def edit_shard(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "shard-00000.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def shard_bytes(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "shard-00000.safetensors").write_bytes(content) and None


def header_bytes(header: str) -> Callable[[Path], None]:
    return shard_bytes(len(header).to_bytes(8, "little") + header.encode() + SHARD[256:])


SHARD_LIST = [{"file": "shard-00000.safetensors", "num_tokens": 3}]
RECORD_AGAIN = "; record it again with exflow profile, or import it with exflow import"
DAMAGED = "; the file is damaged: restore the trace from a copy, or record it again"


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (lambda f: (f / "index.json").unlink(), "index.json", ": no such trace index" + RECORD_AGAIN),
        (lambda f: (f / "index.json").write_text("{"), "index.json", ": the trace index is not valid JSON"),
        (lambda f: (f / "index.json").write_text("[]"), "index.json", ": is not a trace index"),
        (edit_index(format="other"), "index.json", ': is not a trace index (no "format": "exflow-trace")'),
        (edit_index(version=2), "index.json", ": is of trace version 2, this program reads version 1; "),
        (edit_index(extra=1), "index.json", ": unknown key 'extra'" + RECORD_AGAIN),
        (edit_index(top_k="2"), "index.json", ": top_k = '2': Input should be a valid integer"),
        (edit_index(top_k=0), "index.json", ": top_k: is 0; give 1 or more"),
        (edit_index(num_experts=300), "index.json", ": dtype: is uint8, but 300 experts take uint16"),
        (
            edit_index(experts_per_layer=4),
            "index.json",
            ": experts_per_layer = 4: Input should be a valid list",
        ),
        (edit_index(experts_per_layer=[4]), "index.json", ": experts_per_layer: has 1 entries for 2 MoE"),
        (
            edit_index(experts_per_layer=[4, 2.0]),
            "index.json",
            ": experts_per_layer[1] = 2.0: Input should be a",
        ),
        (
            edit_index(experts_per_layer=[4, 2]),
            None,
            ": experts: holds 3 in MoE layer 1; values there must be from 0 to 1",
        ),
        (edit_index(moe_layer_ids=[1, 4]), "index.json", ": moe_layer_ids: layer 4 is not among 4 hidden"),
        (
            edit_index(shards=[{"file": "../secret", "num_tokens": 3}]),
            "index.json",
            ": shards[0].file = '../secret': String should match pattern",
        ),
        (edit_index(shards=[]), "", ": the trace holds no tokens; record it again"),
        (
            edit_index(shards=[*SHARD_LIST, {"file": "shard-00001.safetensors", "num_tokens": 3}]),
            "shard-00001.safetensors",
            ": no such shard, though the index lists it" + DAMAGED,
        ),
        (shard_bytes(b""), None, ": is truncated (0 bytes end inside the header)" + DAMAGED),
        (shard_bytes(SHARD[:100]), None, ": is truncated (100 bytes end inside the header)" + DAMAGED),
        (shard_bytes(SHARD[:-1]), None, ": is truncated (phase ends at byte 39 of 38)" + DAMAGED),
        (shard_bytes(b"\xff" * 300), None, ": is truncated (300 bytes end inside the header)" + DAMAGED),
        (header_bytes("\x00"), None, ": the header is not JSON"),
        (header_bytes("[" * 20_000), None, ": the header is not JSON"),
        (
            header_bytes(HEADER.replace("[36,39]", "[36,Infinity]")),
            None,
            ": the header's entry for phase is malformed" + DAMAGED,
        ),
        (header_bytes("[]"), None, ": the header is not a JSON object"),
        (header_bytes('{"experts": 1}'), None, ": the header's entry for experts is malformed" + DAMAGED),
        (
            header_bytes(HEADER.replace("[36,39]", "[36,40]")),
            None,
            ": the header gives phase the bytes 36 to 40" + DAMAGED,
        ),
        (
            header_bytes(HEADER.replace("[0,12]", "[-12,0]")),
            None,
            ": the header gives position the bytes -12 to 0" + DAMAGED,
        ),
        (edit_shard(lambda t: t.pop("phase")), None, ": has no tensor phase" + DAMAGED),
        (edit_index(has_weights=True), None, ": has no tensor weights" + DAMAGED),
        (
            edit_shard(lambda t: t.update(sequence=t["sequence"].astype(np.int64))),
            None,
            ": sequence is I64 [3], the index says I32 [3]" + DAMAGED,
        ),
        (
            edit_index(shards=[SHARD_LIST[0] | {"num_tokens": 4}]),
            None,
            ": experts is U8 [3, 2, 2], the index says U8 [4, 2, 2]" + DAMAGED,
        ),
        (edit_index(num_experts=3), None, ": experts: holds 3; values must be from 0 to 2"),
        (
            edit_shard(lambda t: t["phase"].__setitem__(0, 7)),
            None,
            ": phase: holds 7; values must be from 0 to 1",
        ),
        (
            edit_shard(lambda t: t["position"].__setitem__(0, 9)),
            "",
            ": the rows of sequence 0 are not in order of position",
        ),
    ],
)
def test_a_damaged_trace_names_file_fault_and_remedy(
    golden: Path, damage: Callable[[Path], None], file: str | None, message: str
) -> None:
    damage(golden)
    with pytest.raises(InputError) as caught:
        RoutingTrace.load(golden)
    path = golden / ("shard-00000.safetensors" if file is None else file)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.npz", "is a file, and a trace is a folder; run exflow import {path} --format npz -o TRACE"),
        ("a.npy", "is a file, and a trace is a folder; run exflow import {path} --format npy -o TRACE"),
        ("a.bin", "is a file, and a trace is a folder; give the folder that holds index.json"),
    ],
)
def test_a_file_is_not_a_trace(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        RoutingTrace.load(path)
    assert str(caught.value).startswith(f"{path}: {message.format(path=path)}")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such trace; record it again with exflow profile"):
        RoutingTrace.load(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_gate_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    """Put such a weight into an array and into a file, beyond the first block of rows."""
    experts = np.zeros((20_000, 2, 1), np.uint8)
    weights = np.full(experts.shape, 65504.0)  # the largest there is
    RoutingTrace.from_arrays(experts, num_experts=2, weights=weights).save(tmp_path / "t")
    assert RoutingTrace.load(tmp_path / "t").weights is not None
    edit_shard(lambda t: t["weights"].__setitem__((17_001, 1), value))(tmp_path / "t")
    message = f"weights: row 17001 holds {value} in MoE layer 1; gate weights are finite"
    with pytest.raises(InputError) as caught:
        RoutingTrace.load(tmp_path / "t")
    assert str(caught.value).startswith(f"{tmp_path / 't' / 'shard-00000.safetensors'}: {message}")
    weights[17_001, 1] = value
    with pytest.raises(InputError, match=f"^{message}"):
        RoutingTrace.from_arrays(experts, num_experts=2, weights=weights)
