"""Bad input of `exflow bench decode` ends the command before ranks are started."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exflow.bench.job import BenchOptions
from exflow.errors import InputError
from exflow.placement.plan.topology import Topology

GOOD = BenchOptions(Path("model"), [], [], [], [], None, 20, None, None, "cpu", None)


@pytest.mark.parametrize(
    ("changes", "nproc", "message"),
    [
        (
            {"plans": [Path("plan.json")]},
            None,
            "--plan plan.json: one process holds all experts; add --nproc N",
        ),
        (
            {"strategies": ["coherent"]},
            None,
            "--strategy coherent: one process has no strategy; add --nproc N",
        ),
        (
            {"strategies": ["auto"]},
            2,
            "--strategy auto: stands for one of the others, the last line says for which; leave it out",
        ),
        (
            {"strategies": ["best"]},
            2,
            "strategy 'best' is unknown; give dispatch-combine, coherent, node-coherent, replicated",
        ),
        (
            {"strategies": ["node-coherent"]},
            2,
            "strategy node-coherent: all ranks are on one node; give coherent instead",
        ),
        (
            {"transports": ["pigeon"]},
            2,
            "--transport pigeon: no such transport; give one-sided, relayed, collective, eager",
        ),
        (
            {"transports": ["eager", "collective"]},
            None,
            "--transport collective: needs GPUs; give eager, or --device cuda",
        ),
        ({"transports": ["one-sided"]}, 2, "--transport one-sided: needs GPUs; give eager, or --device cuda"),
        (
            {"context": 60, "steps": 2},
            2,
            "--context 60: with 5 steps it exceeds the model's 64 positions; give 58 at most, or lower",
        ),
        (
            {"steps": 60},
            2,
            "--steps 60: with 3 steps of warm-up they exceed the model's 64 positions; give 59 at most",
        ),
        ({"dtype": "int8"}, 2, "dtype 'int8' is unknown; give float32 or bfloat16"),
        (
            {"replay": Path("other")},
            2,
            "other: the trace of 'other' has 16 experts a layer, the model 'tiny' 8; replay a trace",
        ),
        (
            {"plans": [Path("other.json")]},
            2,
            "other.json: the plan is for 16 experts a layer, the model has 8; use a plan that was placed",
        ),
        (
            {"plans": [Path("plan.json")]},
            4,
            "plan.json: the plan is for 2 ranks (1 node of 2), launched with 4; start 2 processes, or place",
        ),
        (
            {},
            3,
            "8 experts cannot be shared equally by 3 ranks; choose a number of ranks that divides",
        ),
        (
            {"model": Path("absent")},
            2,
            "absent/config.json: no such model configuration; give the folder of a checkpoint (config.json, "
            "model.safetensors, tokenizer.json)",
        ),
        (
            {"output": Path("plan.json/out.json")},
            2,
            "plan.json/out.json: cannot be written (",
        ),
    ],
)
def test_bad_input_is_found_before_ranks_are_started(
    changes: dict[str, Any], nproc: int | None, message: str, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    with pytest.raises(InputError) as error:
        replace(GOOD, **changes).resolve(nproc and Topology(gpus_per_node=nproc))
    assert str(error.value).startswith(message)


def test_bad_input_ends_the_command(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, command_line: Callable[[str], tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(inputs)
    code, out, err = command_line("bench decode model --plan other.json --nproc 2 --steps 2")
    assert (code, out) == (2, "")
    assert err.startswith("exflow: other.json: the plan is for 16 experts")
