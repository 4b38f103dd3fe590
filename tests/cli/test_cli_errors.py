"""Bad input to every verb: exit code 2, one line on stderr that says what to do, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exflow.placement.make_plan import place
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from tests.cli.spoil import (
    Edit,
    nothing,
    remove,
    replace_in,
    truncate,
    write_object_array,
    write_other_trace,
    write_topology,
    write_wide_ids,
)


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


Run = Callable[[str], tuple[int, str, str]]
PLACE = "place trace -o p.json --time-limit 1"
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
        replace_in("plan.json", '"version": 3', '"version": 7'),
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
    "strategy": (nothing, GENERATE + " --strategy best", ["strategy 'best'", "dispatch-combine"]),
    "node-coherent on one node": (
        nothing,
        GENERATE + " --nproc 2 --strategy node-coherent",
        ["node-coherent", "one node"],
    ),
    "transport": (nothing, GENERATE + " --transport magic", ["transport 'magic'", "one-sided", "eager"]),
    "transport without GPUs": (
        nothing,
        GENERATE + " --device cpu --transport one-sided",
        ["transport one-sided", "needs GPUs", "eager"],
    ),
    "dtype": (nothing, GENERATE + " --dtype int4", ["dtype 'int4'", "float32"]),
    "device": (nothing, GENERATE + " --device tpu", ["device 'tpu'", "cpu"]),
    "temperature": (nothing, GENERATE + " --temperature -1", ["temperature is -1"]),
    "no prompt": (nothing, "generate model", ["--prompt"]),
    "too many tokens": (
        nothing,
        "generate model --prompt hello --max-new-tokens 5000",
        ["prompt 0", "positions"],
    ),
    "trace to a bad place": (nothing, GENERATE + " --trace file/t", ["file/t", "cannot be written"]),
    "no trace to replay": (nothing, GENERATE + " --replay absent", ["absent", "no such trace"]),
    "replay of another model": (
        write_other_trace,
        GENERATE + " --nproc 2 --replay other",
        ["other: ", "4 experts a layer", "the model 'tiny' 8", "replay a trace of a model"],
    ),
    "gpus over nodes": (nothing, "place trace --gpus 4 --nodes 3 -o p.json", ["4 GPUs", "3 nodes"]),
    "method": (nothing, "place trace --gpus 2 --method magic -o p.json", ["magic", "contiguous", "auto"]),
    "no GPUs": (nothing, PLACE, ["--gpus", "--nodes", "--topology"]),
    "GPUs twice": (
        write_topology("nodes: 1\ngpus_per_node: 2\nintra_node: {latency_us: 1, bandwidth_gb_s: 1}\n"),
        PLACE + " --gpus 2 --topology cluster.yaml",
        ["either by --gpus", "or by --topology"],
    ),
    "no topology": (nothing, PLACE + " --topology absent.yaml", ["absent.yaml", "No such file", "docs/"]),
    "topology of nothing": (
        write_topology("nodes: 0\ngpus_per_node: 2\n"),
        PLACE + " --topology cluster.yaml",
        ["cluster.yaml", "nodes", "greater than or equal to 1"],
    ),
    "topology no YAML": (
        write_topology("nodes: ["),
        PLACE + " --topology cluster.yaml",
        ["cluster.yaml", "not YAML", "line 1"],
    ),
    "topology of an unknown link": (
        write_topology("\tGPU0\tGPU1\nGPU0\tX\tIB4\nGPU1\tIB4\tX\n"),
        PLACE + " --topology cluster.yaml",
        ["cluster.yaml", "GPU0 to GPU1 is 'IB4'", "NV1 to NV18"],
    ),
    "no cost matrix": (nothing, PLACE + " --cost-matrix absent.json", ["absent.json", "no such cost matrix"]),
    "costs no JSON": (nothing, PLACE + " --cost-matrix book.txt", ["book.txt", "not valid JSON", "docs/"]),
    "costs twice": (
        nothing,
        PLACE + " --cost-matrix plan.json --gpus 2",
        ["--cost-matrix", "leave out --gpus and --topology"],
    ),
    "costs of no pairs": (
        write_topology("[[0, 1], [2, 0]]"),
        PLACE + " --cost-matrix cluster.yaml",
        ["cluster.yaml", "is 1.0, but 2.0 the other way", "both ways the same"],
    ),
    "costs over nodes": (
        write_topology("[[0, 1, 1], [1, 0, 1], [1, 1, 0]]"),
        PLACE + " --cost-matrix cluster.yaml --nodes 2",
        ["cluster.yaml", "3 GPUs", "2 nodes", "a multiple of 2"],
    ),
    "memory of what": (
        nothing,
        PLACE + " --gpus 2 --gpu-memory 1",
        ["--gpu-memory", "--expert-size", "both"],
    ),
    "experts of what memory": (nothing, PLACE + " --gpus 2 --expert-size 1", ["--gpu-memory", "give both"]),
    "too little memory": (
        nothing,
        PLACE + " --gpus 2 --gpu-memory 0.5 --expert-size 64",
        ["--gpu-memory 0.5", "4 experts in 4 layers", "1.0 GiB", "more GPUs"],
    ),
    "redundant experts take memory": (
        nothing,
        PLACE + " --gpus 2 --gpu-memory 1 --expert-size 64 --redundant-experts 2",
        ["--gpu-memory 1:", "5 experts in 4 layers", "1.2 GiB", "fewer redundant experts"],
    ),
    "strategy of a plan": (nothing, PLACE + " --gpus 2 --strategy best", ["'best'", "node-coherent"]),
    "max imbalance": (
        nothing,
        PLACE + " --gpus 2 --max-imbalance 0.5",
        ["max imbalance is 0.5", "1 or more"],
    ),
    "balance price": (
        nothing,
        PLACE + " --gpus 2 --balance-price inf",
        ["balance price is inf", "from 0 up"],
    ),
    "max imbalance that cannot be": (
        nothing,
        PLACE + " --gpus 8 --max-imbalance 1",
        ["max imbalance 1 cannot be kept", "choose"],
    ),
    "max imbalance of a baseline": (
        nothing,
        PLACE + " --gpus 8 --max-imbalance 1 --method contiguous",
        ["contiguous", "over the max imbalance", "use a method that solves"],
    ),
    "weights for fewer traces": (
        nothing,
        PLACE + " --gpus 2 --weight 1 --weight 2",
        ["--weight: 2", "1 traces", "one for each"],
    ),
    "weight of nothing": (nothing, PLACE + " --gpus 2 --weight 0", ["--weight", "0.0", "no positive number"]),
    "weight of no number": (
        nothing,
        PLACE + " --gpus 2 --weight nan",
        ["--weight", "nan", "positive number"],
    ),
    "worst case of one": (nothing, PLACE + " --gpus 2 --worst-case", ["--worst-case", "two at least"]),
    "worst case and weights": (
        nothing,
        "place trace trace -o p.json --gpus 2 --worst-case --weight 1 --weight 1",
        ["--worst-case does not go with --weight"],
    ),
    "worst case and prices": (
        nothing,
        "place trace trace -o p.json --gpus 2 --worst-case --pareto",
        ["--worst-case does not go with --pareto"],
    ),
    "prices and a plan in use": (
        nothing,
        PLACE + " --gpus 2 --pareto --from plan.json --max-moves 1",
        ["--pareto does not go with --from"],
    ),
    "from, but how far": (nothing, PLACE + " --gpus 2 --from plan.json", ["--from", "--max-moves", "both"]),
    "moves, but from where": (nothing, PLACE + " --gpus 2 --max-moves 1", ["--from", "--max-moves", "both"]),
    "no plan in use": (
        nothing,
        PLACE + " --gpus 2 --from absent.json --max-moves 1",
        ["absent.json", "no such plan"],
    ),
    "plan in use elsewhere": (
        nothing,
        PLACE + " --gpus 4 --from plan.json --max-moves 1",
        ["2 ranks (1 node of 2)", "4 ranks (1 node of 4)", "give the same GPUs"],
    ),
    "plan in use of another model": (
        write_other_trace,
        "place other -o p.json --gpus 2 --from plan.json --max-moves 1",
        ["the plan is for 8 experts", "the trace has 4"],
    ),
    "traces of two models": (
        write_other_trace,
        "place trace other -o p.json --gpus 2",
        ["trace 1", "8 experts", "trace 2", "4 experts", "give traces of one model"],
    ),
    "share of nothing": (nothing, PLACE + " --gpus 2 --holdout 0", ["0.0", "between 0 and 1"]),
    "share of more": (nothing, PLACE + " --gpus 2 --holdout 1.5", ["1.5", "between 0 and 1"]),
    "share of one sequence": (nothing, PLACE + " --gpus 2 --holdout 0.5", ["0.5", "1 sequence", "record 2"]),
    "curve of one sequence": (
        nothing,
        PLACE + " --gpus 2 --learning-curve",
        ["1 sequence", "record 4 at least"],
    ),
    "exact with replicas": (
        nothing,
        PLACE + " --gpus 2 --method exact --redundant-experts 2",
        ["method exact", "replicas", "use method search"],
    ),
    "no plan wanted": (nothing, "place trace --gpus 2", ["--output is missing", "name the file"]),
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
    case: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Run
) -> None:
    edit, command, words = CASES[case]
    folder = tmp_path / "work"
    shutil.copytree(inputs, folder)
    edit(folder)
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code, out, err = command_line(command)
    assert (code, out) == (2, "")
    assert err.startswith("exflow: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--gpus", "0"), ("--redundant-experts", "-1"), ("--max-moves", "-1"), ("--balance-price", "-1")],
)
def test_numbers_that_an_option_never_takes(
    option: str, value: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, command_line: Run
) -> None:
    """The parser answers these itself, in a box."""
    monkeypatch.chdir(inputs)
    code, out, err = command_line(f"place trace {option} {value}")
    assert (code, out) == (2, "")
    assert f"Invalid value for '{option}'" in err
