"""The demo: of a tiny model, and in full as `make demo` runs it, which is the promise of the README."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exflow.cli.first_steps import print_demo
from exflow.commands.demo import summary
from exflow.model.config import ModelConfig

README = Path(__file__).parents[2] / "README.md"

KEYS = {
    "strategy",
    "placement",
    "ranks",
    "messages_per_token_layer",
    "local_fraction",
    "imbalance",
    "all_to_alls_per_step",
    "gathers_per_step",
    "all_reduces_per_step",
    "tokens_per_s",
}


Variants = dict[tuple[str, str], dict[str, Any]]


def of_shipped(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs the demo in full."""
    marked: Callable[..., None] = pytest.mark.all(pytest.mark.slow(pytest.mark.distributed(test)))
    return marked


def run_demo(*options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "exflow.cli", "demo", "--json", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shown: dict[str, Any] = json.loads(run.stdout)  # stdout holds nothing else
    return shown


def by_name(result: dict[str, Any]) -> Variants:
    return {(variant["strategy"], variant["placement"]): variant for variant in result["variants"]}


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    """The demo as `make demo` runs it."""
    return run_demo()


def check_variants(result: dict[str, Any], collectives: dict[str, tuple[int, int, int]]) -> None:
    assert result["same_tokens"] is True
    assert len(result["text"]) == 8
    assert all(set(variant) >= KEYS for variant in result["variants"])
    counted = ("all_to_alls_per_step", "gathers_per_step", "all_reduces_per_step")
    for (strategy, _), variant in by_name(result).items():
        assert tuple(variant[name] for name in counted) == collectives[strategy]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demo_of_a_tiny_model(
    tiny_checkpoint: Callable[..., Path], tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    model = tiny_checkpoint(tiny_config(max_positions=256))
    (tmp_path / "book.txt").write_text("It was a dark and stormy night.\n" * 400)
    result = run_demo("--model", str(model), "--text", str(tmp_path / "book.txt"))
    collectives = {"dispatch-combine": (8, 0, 0), "coherent": (4, 2, 0), "replicated": (0, 0, 4)}
    check_variants(result, collectives)
    assert len(result["variants"]) == 6


@of_shipped
def test_every_variant_says_the_same(shipped: dict[str, Any]) -> None:
    collectives = {"dispatch-combine": (24, 0, 0), "coherent": (12, 2, 0), "replicated": (0, 0, 12)}
    check_variants(shipped, collectives)


@of_shipped
def test_affinity_and_coherence_move_less(shipped: dict[str, Any]) -> None:
    messages = {key: variant["messages_per_token_layer"] for key, variant in by_name(shipped).items()}
    assert messages["coherent", "affinity"] < 0.7 * messages["dispatch-combine", "contiguous"]
    assert messages["coherent", "affinity"] < messages["coherent", "contiguous"]
    assert messages["coherent", "contiguous"] < messages["dispatch-combine", "contiguous"]


@of_shipped
def test_the_readme_shows_what_the_demo_prints(
    shipped: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_demo(shipped, as_json=False)
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    listing = README.read_text(encoding="utf-8").split("```text\nstrategy ", 1)[1].split("```", 1)[0]
    table_and_summary, verdict = f"strategy {listing}".split("\n...\n")
    assert table_and_summary in printed
    assert printed.endswith(verdict.rstrip())


def variant(
    strategy: str, placement: str, messages: float, collectives: tuple[int, int, int]
) -> dict[str, Any]:
    counted = ("all_to_alls_per_step", "gathers_per_step", "all_reduces_per_step")
    return {
        "strategy": strategy,
        "placement": placement,
        "messages_per_token_layer": messages,
        "critical_bytes_per_token_layer": 100.0,
        "background_bytes_per_token_layer": 0.0,
        "imbalance": 1.0,
        **dict(zip(counted, map(float, collectives), strict=True)),
    }


def test_the_table_has_no_messages_where_none_are_sent(capsys: pytest.CaptureFixture[str]) -> None:
    variants = [
        variant("coherent", "affinity", 0.5, (12, 2, 0)),
        variant("replicated", "affinity", 0.0, (0, 0, 12)),
    ]
    print_demo({"variants": variants, "summary": "", "text": [], "verdict": ""}, as_json=False)
    _, coherent, replicated, *_ = capsys.readouterr().out.splitlines()
    assert coherent.split()[2] == "0.5" and coherent.rstrip().endswith("12 all-to-alls, 2 gathers")
    assert replicated.split()[2] == "-" and replicated.rstrip().endswith("12 all-reduces")


def test_the_summary_tells_the_two_effects_apart() -> None:
    variants = [
        variant("dispatch-combine", "contiguous", 1.5, (24, 0, 0)),
        variant("dispatch-combine", "affinity", 1.65, (24, 0, 0)),
        variant("coherent", "contiguous", 0.75, (12, 2, 0)),
        variant("coherent", "affinity", 0.6, (12, 2, 0)),
    ]
    coherence, placement, why = summary(variants, top_k=1).splitlines()
    assert coherence == "Coherence alone: 50% fewer messages, and 12 all-to-alls a step instead of 24."
    assert placement == "Placement alone: 20% fewer messages with coherent, 10% more with dispatch-combine."
    assert "top-1" in why
    assert len(summary(variants, top_k=2).splitlines()) == 2
