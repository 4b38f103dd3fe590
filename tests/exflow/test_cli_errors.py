"""Bad input to every verb: exit code 2, one line on stderr that says what to do, nothing left behind."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exflow import cli
from exflow.placement.place import place
from exflow.placement.topology import Topology
from exflow.profiling.trace import RoutingTrace

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A folder with a good checkpoint, trace, plan, text and configuration."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_checkpoint(), folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    layers = config["num_hidden_layers"] // config["moe_every"]
    routing = np.random.default_rng(0).integers(0, config["num_experts"], (64, layers, config["top_k"]))
    trace = RoutingTrace.from_arrays(routing, num_experts=config["num_experts"], model=config["name"])
    trace.save(folder / "trace")
    place(trace, Topology(gpus_per_node=2)).save(folder / "plan.json")
    (folder / "book.txt").write_text("It was a dark and stormy night.\n" * 400)
    (folder / "file").write_text("not a folder")
    return folder


def replace_in(name: str, old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit


def truncate(pattern: str) -> Edit:
    def edit(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return edit


def remove(pattern: str) -> Edit:
    def edit(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        path.unlink()

    return edit


def write_object_array(folder: Path) -> None:
    np.save(folder / "pickle.npy", np.array([{1: 2}], dtype=object), allow_pickle=True)


def write_wide_ids(folder: Path) -> None:
    np.savez(folder / "wide.npz", experts=np.array([[[300]]]), num_experts=8)


def nothing(folder: Path) -> None:
    """The input is bad without any change."""


GENERATE = "generate model --prompt hello --max-new-tokens 4"
CASES: dict[str, tuple[Edit, str, list[str]]] = {
    "no trace": (nothing, "evaluate plan.json absent", ["absent", "no such trace", "exflow profile"]),
    "truncated trace": (
        truncate("trace/*.safetensors"),
        "evaluate plan.json trace",
        ["trace/shard", "truncated"],
    ),
    "trace version": (
        replace_in("trace/index.json", '"version": 1', '"version": 7'),
        "evaluate plan.json trace",
        ["trace/index.json", "version 7", "version 1"],
    ),
    "no plan": (nothing, "evaluate absent.json trace", ["absent.json", "no such plan", "exflow place"]),
    "truncated plan": (truncate("plan.json"), "evaluate plan.json trace", ["plan.json", "not valid JSON"]),
    "plan version": (
        replace_in("plan.json", '"version": 1', '"version": 7'),
        "evaluate plan.json trace",
        ["plan.json", "version is 7"],
    ),
    "plan of another model": (
        replace_in("plan.json", '"moe_layer_ids": [0, ', '"moe_layer_ids": [1, '),
        GENERATE + " --plan plan.json --nproc 2",
        ["plan.json", "moe_layer_ids"],
    ),
    "plan for more ranks": (
        nothing,
        GENERATE + " --plan plan.json --nproc 4",
        ["plan.json", "2 ranks", "launched with 4", "start 2 processes"],
    ),
    "plan, but one process": (
        nothing,
        GENERATE + " --plan plan.json",
        ["plan.json", "2 ranks", "launched with 1"],
    ),
    "no checkpoint": (nothing, "generate absent --prompt hello", ["absent/config.json", "no such"]),
    "truncated weights": (
        truncate("model/model.safetensors"),
        GENERATE,
        ["model/model.safetensors", "truncated?"],
    ),
    "no weights": (remove("model/model.safetensors"), GENERATE, ["model/model.safetensors"]),
    "truncated tokenizer": (
        truncate("model/tokenizer.json"),
        GENERATE,
        ["tokenizer.json", "not a tokenizer"],
    ),
    "unknown key in the model": (
        replace_in("model/config.json", '"top_k"', '"top_q"'),
        GENERATE,
        ["model/config.json", "top_"],
    ),
    "strategy": (nothing, GENERATE + " --strategy best", ["--strategy best", "dispatch-combine"]),
    "node-coherent on one node": (
        nothing,
        GENERATE + " --nproc 2 --strategy node-coherent",
        ["node-coherent", "one node"],
    ),
    "dtype": (nothing, GENERATE + " --dtype int4", ["--dtype int4", "float32"]),
    "device": (nothing, GENERATE + " --device tpu", ["--device tpu", "cpu"]),
    "temperature": (nothing, GENERATE + " --temperature -1", ["--temperature -1"]),
    "no prompt": (nothing, "generate model", ["--prompt"]),
    "too many tokens": (
        nothing,
        "generate model --prompt hello --max-new-tokens 5000",
        ["prompt 0", "positions"],
    ),
    "trace to a bad place": (nothing, GENERATE + " --trace file/t", ["file/t", "cannot be written"]),
    "experts over ranks": (nothing, "place trace --gpus 3 -o p.json", ["8 experts", "3"]),
    "gpus over nodes": (nothing, "place trace --gpus 4 --nodes 3 -o p.json", ["--gpus 4", "3 nodes"]),
    "method": (nothing, "place trace --gpus 2 --method magic -o p.json", ["magic", "contiguous", "auto"]),
    "plan to a bad place": (
        nothing,
        "place trace --gpus 2 -o file/p.json",
        ["file/p.json", "cannot be written"],
    ),
    "phase": (nothing, "evaluate plan.json trace --phase dawn", ["dawn", "decode"]),
    "no such phase": (nothing, "evaluate plan.json trace --phase prefill", ["prefill", "no such tokens"]),
    "no text": (nothing, "profile model --text absent.txt -o t", ["absent.txt", "no such text"]),
    "length": (nothing, "profile model --text book.txt -o t --length 9999", ["--length 9999", "positions"]),
    "profile to a bad place": (
        nothing,
        "profile model --text book.txt -o file/t",
        ["file/t", "cannot be written"],
    ),
    "import of a pickle": (write_object_array, "import pickle.npy -o t", ["pickle.npy"]),
    "ids out of range": (write_wide_ids, "import wide.npz -o t", ["wide.npz", "300"]),
    "format": (nothing, "import book.txt -o t", ["book.txt"]),
    "no configuration": (nothing, "train absent.yaml -o run", ["absent.yaml", "No such file", "configs/"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(
    case: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, command, words = CASES[case]
    folder = tmp_path / "work"
    shutil.copytree(inputs, folder)
    edit(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["exflow", *command.split()])
    monkeypatch.setattr(cli, "answer_signals", lambda: None)  # pytest's own stay
    before = sorted(folder.rglob("*"))

    with pytest.raises(SystemExit) as stop:
        cli.main()

    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("exflow: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert sorted(folder.rglob("*")) == before
