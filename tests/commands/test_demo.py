"""The demo in full, as `make demo` runs it: the promise of the README."""

import json
import subprocess
import sys
from typing import Any

import pytest

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


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "exflow.cli", "demo", "--json"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    shown: dict[str, Any] = json.loads(run.stdout)  # stdout holds nothing else
    return shown


@pytest.fixture(scope="module")
def variants(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(variant["strategy"], variant["placement"]): variant for variant in result["variants"]}


@pytest.mark.slow
@pytest.mark.distributed
def test_every_variant_says_the_same(result: dict[str, Any]) -> None:
    assert result["same_tokens"] is True
    assert len(result["text"]) == 8
    assert all(set(variant) >= KEYS for variant in result["variants"])


@pytest.mark.slow
@pytest.mark.distributed
def test_affinity_and_coherence_move_less(variants: dict[tuple[str, str], dict[str, Any]]) -> None:
    messages = {key: variant["messages_per_token_layer"] for key, variant in variants.items()}
    assert messages["coherent", "affinity"] < 0.7 * messages["dispatch-combine", "contiguous"]
    assert messages["coherent", "affinity"] < messages["coherent", "contiguous"]
    assert messages["coherent", "contiguous"] < messages["dispatch-combine", "contiguous"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "collectives"),
    [("dispatch-combine", (24, 0, 0)), ("coherent", (12, 2, 0)), ("replicated", (0, 0, 12))],
)
def test_collectives_of_a_decode_step(
    variants: dict[tuple[str, str], dict[str, Any]], strategy: str, collectives: tuple[int, int, int]
) -> None:
    for placement in ("contiguous", "affinity"):
        variant = variants[strategy, placement]
        counted = ("all_to_alls_per_step", "gathers_per_step", "all_reduces_per_step")
        assert tuple(variant[name] for name in counted) == collectives
