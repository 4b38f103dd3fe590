"""Output of successful verbs: JSON under the names other tools rely on, and nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import load_model
from exflow.runtime.request import Request
from tests.one_process import tokens_of_one_process

STRATEGY_KEYS = {
    "messages_per_token_layer",
    "intra_node",
    "inter_node",
    "dispatch",
    "return",
    "kv_copies",
    "exchanges_per_step",
}

Run = Callable[[str], str]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command_line: Callable[[str], tuple[int, str, str]]
) -> Run:
    """run("place trace --gpus 2 ...") in a folder of its own; what it printed on stdout."""
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> str:
        code, out, err = command_line(line)
        assert not code, err
        return out

    return command


def test_from_routing_to_evaluation(run: Run, tmp_path: Path) -> None:
    experts = np.random.default_rng(0).integers(0, 8, (300, 6, 2))
    np.savez(tmp_path / "routing.npz", experts=experts, seq=np.arange(300) // 10, num_experts=8)

    imported = json.loads(run("import routing.npz -o trace --json"))
    assert imported["tokens"] == 300
    assert imported["sequences"] == 30
    assert (imported["moe_layers"], imported["experts"], imported["top_k"]) == (6, 8, 2)

    placed = json.loads(run("place trace --gpus 4 --nodes 2 -o plan.json --json"))
    assert placed["lower_bound"] <= placed["objective"]

    result = json.loads(run("evaluate plan.json trace --json"))
    assert set(result["strategies"]) == {"dispatch_combine", "coherent", "node_coherent", "replicated"}
    for figures in result["strategies"].values():
        assert set(figures) >= STRATEGY_KEYS
        assert figures["messages_per_token_layer"] == pytest.approx(figures["dispatch"] + figures["return"])
        assert figures["messages_per_token_layer"] == pytest.approx(
            figures["intra_node"] + figures["inter_node"]
        )
    assert result["strategies"]["dispatch_combine"]["exchanges_per_step"] == 12
    assert 0 <= result["local_fraction"] <= 1
    assert 1 <= result["imbalance"]["mean"] <= result["imbalance"]["max"]


def test_without_nodes_there_is_no_node_coherence(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "routing.npy", np.random.default_rng(0).integers(0, 4, (50, 3)))
    run("import routing.npy -o trace")
    run("place trace --gpus 2 -o plan.json")
    result = json.loads(run("evaluate plan.json trace --json"))
    assert "node_coherent" not in result["strategies"]
    assert result["strategies"]["coherent"]["return"] == 0
    assert result["strategies"]["coherent"]["exchanges_per_step"] == 3


def test_profile_then_generate(run: Run, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    model = tiny_checkpoint()
    (tmp_path / "book.txt").write_text("It was a dark and stormy night.\n" * 100)
    profiled = json.loads(run(f"profile {model} --text book.txt -o trace --tokens 640 --json"))
    assert profiled["tokens"] == 640

    result = json.loads(
        run(
            f"generate {model} --prompt Rain --prompt Wind --max-new-tokens 5 --ignore-end --trace own --json"
        )
    )
    assert [len(tokens) for tokens in result["tokens"]] == [5, 5]
    assert result["tokens"] == tokens_of_one_process(model, ["Rain", "Wind"], 5)
    assert len(result["text"]) == 2
    assert json.loads(run(f"generate {model} --prompt Rain --max-new-tokens 5 --ignore-end --json"))[
        "tokens"
    ] == [result["tokens"][0]]


def test_a_hugging_face_model_generates(
    run: Run, tmp_path: Path, hugging_face_model: Callable[..., Any], byte_tokenizer: Tokenizer
) -> None:
    """A whole run ends at the tokens that generation_config.json names, or not if told so."""
    model = hugging_face_model("gpt_oss").folder
    byte_tokenizer.save(str(model / "tokenizer.json"))
    generate = f"generate {model} --prompt Rain --max-new-tokens 8 --json"
    whole = json.loads(run(f"{generate} --ignore-end"))["tokens"][0]
    assert whole == load_model(model).generate(Request([byte_tokenizer.encode("Rain").ids], 8)).tokens[0]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, whole[2]]}))
    result = json.loads(run(generate))
    assert result["tokens"] == [whole[: whole.index(whole[2]) + 1]]
    assert result["text"] == [byte_tokenizer.decode(result["tokens"][0])]
    run(f"{generate} --ignore-end --trace own")
    assert RoutingTrace.load(tmp_path / "own").model == "gpt_oss"


def test_a_run_replays_a_trace(run: Run, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(8), (20, 4, 1)), axis=2)[:, :, :2]
    RoutingTrace.from_arrays(experts, num_experts=8).save(tmp_path / "dictated")
    generate = f"generate {tiny_checkpoint()} --prompt Rain --max-new-tokens 5 --ignore-end --json"
    run(f"{generate} --replay dictated --trace own")
    own = RoutingTrace.load(tmp_path / "own")
    assert np.array_equal(own.experts, experts[: len("Rain") + 4, :, :1])


def test_tables_for_people(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "routing.npy", np.random.default_rng(0).integers(0, 4, (50, 3)))
    run("import routing.npy -o trace")
    assert "optimal" in run("place trace --gpus 2 -o plan.json")
    table = run("evaluate plan.json trace")
    assert "dispatch-combine" in table
    assert max(len(line) for line in table.splitlines()) <= 100


def test_a_time_limit_far_too_short_still_gives_a_plan(run: Run, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "routing.npz",
        experts=np.random.default_rng(0).integers(0, 64, (200, 8, 2)),
        num_experts=64,
    )
    run("import routing.npz -o trace")
    short = json.loads(run("place trace --gpus 8 -o short.json --time-limit 0.1 --json"))
    run("place trace --gpus 8 -o contiguous.json --method contiguous")
    contiguous = json.loads(run("evaluate contiguous.json trace --json"))
    assert (
        short["messages_coherent"] <= contiguous["strategies"]["coherent"]["messages_per_token_layer"] * 1.01
    )


@pytest.mark.slow
def test_help_loads_nothing_heavy() -> None:
    shown = subprocess.run([sys.executable, "-m", "exflow.cli", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(verb in shown.stdout for verb in ("profile", "place", "evaluate", "generate", "train", "demo"))
    code = (
        "import sys, exflow.cli; print([name for name in ('torch', 'numba', 'scipy') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
