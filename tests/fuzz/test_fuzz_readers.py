"""Hostile files: every reader refuses them with one line, and none runs, allocates or opens what they say."""

import ast
import io
import json
import os
import pickle
import signal
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.robustness.fuzz import pool as fuzzing
from benchmarks.robustness.fuzz.checkpoints import THEIRS
from benchmarks.robustness.fuzz.inputs import Target, case, keep
from benchmarks.robustness.fuzz.pool import Pool
from benchmarks.robustness.fuzz.reading import ran_out
from benchmarks.robustness.fuzz.targets import targets as every_target
from exflow.errors import InputError
from exflow.model.families import FAMILIES
from tests.payload import Payload

ROOT = Path(__file__).parents[2]
INPUTS = 20  # of each reader


@pytest.fixture(scope="module")
def targets() -> dict[str, Any]:
    return {target.name: target for target in every_target()}


@pytest.fixture
def refusal(targets: dict[str, Any], tmp_path: Path) -> Callable[[str, dict[str, bytes]], str]:
    """refusal(reader, files): what the reader says of its valid files with these in their place."""

    def read(name: str, files: dict[str, bytes]) -> str:
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        for file, content in (targets[name].files | files).items():
            (folder / file).write_bytes(content)
        with pytest.raises(InputError) as error:
            targets[name].read(folder)
        assert not ran_out(error.value)
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    return read


def test_valid_files_are_read(targets: dict[str, Any], tmp_path: Path) -> None:
    for target in targets.values():
        folder = tmp_path / target.name
        folder.mkdir()
        for name, content in target.files.items():
            (folder / name).write_bytes(content)
        target.read(folder)


def test_no_reader_crashes(targets: dict[str, Any], tmp_path: Path) -> None:
    with Pool(list(targets.values()), tmp_path, seed=0) as pool:
        for target in targets.values():
            result = pool.fuzz(target, INPUTS, seconds=60)
            assert result.tried == INPUTS
            assert result.crashes == {}, target.name


def test_large_topologies_are_read_soon(targets: dict[str, Any], tmp_path: Path) -> None:
    """The fuzzer's find: 3,200 GPUs in 168 bytes took 2 s. And as many GPUs as there may be."""
    target = targets["topology 2x8"]
    name, found = case(target, 6, 61065)
    assert found.startswith(b'{"nodes": 400, "gpus_per_node": 8, ')
    for content in (found, found.replace(b"400", b"512", 1)):
        (tmp_path / name).write_bytes(content)
        taken = []
        for _ in range(3):  # the least, since others may use the machine
            start = time.process_time()
            target.read(tmp_path)
            taken.append(time.process_time() - start)
        assert min(taken) < 1.0


# The fuzzer itself.


def _allocates(folder: Path) -> None:
    try:
        bytearray(1 << 40)
    except MemoryError as error:
        raise InputError("cannot be read") from error


def _hangs(folder: Path) -> None:
    while True:
        pass


def _waits(folder: Path) -> None:
    signal.pause()


def _aborts(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fails(folder: Path) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("read", "crash"),
    [
        (_allocates, "an InputError because memory ran out"),
        (_hangs, "takes more than 0.1 s"),
        (_waits, "takes more than 0.1 s"),
        (_aborts, "killed by SIGKILL"),
        (_fails, "KeyError at ?"),
    ],
)
def test_the_fuzzer_sees(
    read: Callable[[Path], None], crash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 0.1)
    monkeypatch.setattr(fuzzing, "WALL_SECONDS", 0.2)
    target = Target("broken", {"file": b"[1]"}, ("file",), read)
    with Pool([target], tmp_path / "scratch", seed=0) as pool:
        result = pool.fuzz(target, inputs=2, seconds=60)
    assert result.crashes == {crash: [0, 1]}
    keep(target, 0, result, tmp_path / "kept")
    assert [path.name[:2] for path in (tmp_path / "kept" / "broken").iterdir()] == ["0-"]


def _fails_at_times(folder: Path) -> None:
    if len((folder / "file").read_bytes()) % 3 == 0:
        raise KeyError("x")


@pytest.mark.parametrize("inputs", [2, 29])
def test_cores_share_the_inputs(inputs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "BATCH", 4)
    target = Target("broken", {"file": b"[1, 2, 3]"}, ("file",), _fails_at_times)
    results = []
    for cores in (1, 3):
        with Pool([target], tmp_path / str(cores), seed=0, cores=cores) as pool:
            results.append(pool.fuzz(target, inputs, seconds=60))
    assert (results[0].tried, len(results[0].crashes)) == (inputs, 1)
    assert results[0] == results[1]


def _dies_at_times(folder: Path) -> None:
    if (folder / "file").read_bytes().startswith(b"1"):
        _aborts(folder)


def test_of_a_batch_each_input_that_kills_is_found(tmp_path: Path) -> None:
    target = Target("broken", {"file": b"1"}, ("file",), _dies_at_times)
    with Pool([target], tmp_path, seed=0) as pool:
        result = pool.fuzz(target, inputs=12)
    killing = [number for number in range(12) if case(target, 0, number)[1].startswith(b"1")]
    assert 0 < len(killing) < 12
    assert (result.tried, result.crashes) == (12, {"killed by SIGKILL": killing})


def test_inputs_follow_from_the_seed(targets: dict[str, Any]) -> None:
    target = targets["plan"]
    inputs = [case(target, 3, number) for number in range(20)]
    assert inputs == [case(target, 3, number) for number in range(20)]
    assert inputs != [case(target, 4, number) for number in range(20)]


# Attacks by name.

Refusal = Callable[[str, dict[str, bytes]], str]
YAML = {
    "topology 2x8": "topology.yaml",
    "machine": "machine.yaml",
    "training": "train.yaml",
    "placement trtllm": "data",
}


@pytest.mark.parametrize("reader", YAML)
def test_yaml_that_would_run_code(reader: str, refusal: Refusal, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]\n"
    refusal(reader, {YAML[reader]: text.encode()})
    refusal(reader, {YAML[reader]: b"!!python/object:exflow.model.config.ModelConfig {}\n"})
    assert not mark.exists()


@pytest.mark.parametrize("reader", YAML)
def test_yaml_that_unfolds(reader: str, refusal: Refusal) -> None:
    """Each line doubles what the line before it holds: 2 ** 40 keys in a kilobyte."""
    rows = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 41))]
    refusal(reader, {YAML[reader]: "\n".join(rows).encode()})


def _object_array(mark: Path) -> bytes:
    with io.BytesIO() as file:
        np.save(file, np.array([Payload(mark)], dtype=object), allow_pickle=True)
        return file.getvalue()


def _npz(member: bytes, name: str = "experts.npy") -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, member)
        return file.getvalue()


def _torch(mark: Path) -> bytes:
    with io.BytesIO() as file:
        torch.save({"logical_count": Payload(mark), "records": []}, file)
        return file.getvalue()


def test_pickles_are_not_loaded(targets: dict[str, Any], refusal: Refusal, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    kinds = [pickle.dumps(Payload(mark)), pickle.dumps(Payload(mark), 0), _object_array(mark), _torch(mark)]
    for name, target in targets.items():
        for content in (*kinds, _npz(_object_array(mark))):
            refusal(name, {target.attacked[0]: content})
    assert not mark.exists()


def test_a_trace_index_leads_to_no_other_folder(
    targets: dict[str, Any], refusal: Refusal, tmp_path: Path
) -> None:
    target = targets["trace index"]
    index = json.loads(target.files["index.json"])
    shard = index["shards"][0]["file"]
    (tmp_path / shard).write_bytes(target.files[shard])  # where ../ leads
    for file in (f"../{shard}", f"{tmp_path}/{shard}", f"./../{shard}", "..", f"{shard}\n", f"{shard}\0"):
        index["shards"][0]["file"] = file
        assert "shards[0].file" in refusal("trace index", {"index.json": json.dumps(index).encode()})


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting(opening: str, targets: dict[str, Any], refusal: Refusal) -> None:
    closing = "]" if opening == "[" else "}"
    deep = (opening * 20_000 + "1" + closing * 20_000).encode()
    for name, target in targets.items():
        file = target.attacked[0]
        refusal(name, {file: deep})
        refusal(name, {file: struct.pack("<Q", len(deep)) + deep})


@pytest.mark.parametrize(
    "reader", ["trace shard", "weights own", "weights mixtral", "import trtllm", "placement eplb"]
)
def test_headers_that_declare_100_gigabytes(reader: str, targets: dict[str, Any], refusal: Refusal) -> None:
    target = targets[reader]
    file = next(name for name in target.attacked if target.files[name][8:9] == b"{")
    size = 10**11
    refusal(reader, {file: struct.pack("<Q", size) + b"{" + b" " * 91})
    length = int.from_bytes(target.files[file][:8], "little")
    header = json.loads(target.files[file][8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"], entry["data_offsets"] = [size // 4, 1], [0, size]
    text = json.dumps(header).encode()
    refusal(reader, {file: struct.pack("<Q", len(text)) + text + b"\0" * 100})


def _npy_header(shape: str, dtype: str = "|u1") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def test_arrays_that_declare_100_gigabytes(refusal: Refusal) -> None:
    bomb = _npy_header("(1000000000, 10, 10)")
    refusal("import npy", {"data": bomb})
    refusal("import npz", {"data": _npz(bomb)})
    refusal("import npz", {"data": _npz(bomb + b"\0" * (100 << 20))})
    big = _npz(bomb)
    at = big.index(b"PK\x01\x02") + 24  # the size that the directory says its member unfolds to
    refusal("import npz", {"data": big[:at] + struct.pack("<I", 2**32 - 2) + big[at + 4 :]})


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_experts", "hidden_size", "max_position_embeddings"]
)
def test_configurations_that_declare_a_model_without_end(key: str, refusal: Refusal) -> None:
    for family in FAMILIES:
        for number in (10**12, 10**30):
            config = THEIRS | {"model_type": family, key: number}
            refusal(f"config {family}", {"config.json": json.dumps(config).encode()})


FORBIDDEN = {
    "eval",
    "exec",
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "yaml.unsafe_load",
    "yaml.full_load",
}
SOURCE = ("exflow", "profiling", "placement", "kernels")
HANDED_OVER = ("exflow/job/launch.py", "exflow/job/rank.py")  # from parent to child, through a pipe


def test_the_source_unpickles_and_evaluates_nothing() -> None:
    for path in [each for folder in SOURCE for each in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = FORBIDDEN & {name.name.split(".")[0] for name in node.names}
                pickles = {"pickle"} if str(path.relative_to(ROOT)) in HANDED_OVER else set()
                assert found <= pickles, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in FORBIDDEN, path
            assert given.get("allow_pickle", "False") == "False", path
            if called == "torch.load":
                assert given["weights_only"] == "True", path
            if called == "yaml.load":
                assert given["Loader"] in ("_Loader", "PlainLoader"), path  # SafeLoaders, with less
