"""Commands that run at once on one machine do not disturb each other: ports, temporary files, caches."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exflow.commands.profile import profile, windows_of_text
from exflow.model.checkpoint import Checkpoint
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import default_plan, load_model
from exflow.runtime.request import Request

WORDS = ("Rain", "Storm")


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.distributed
def test_commands_at_once(
    tiny_config: Callable[..., ModelConfig], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Two jobs of two ranks, two recordings into sibling folders, two that compile into the same cache."""
    model = tiny_checkpoint(tiny_config(top_k=2))
    plan, routing = tmp_path / "plan.json", tmp_path / "routing"
    default_plan(load_model_config(model), Topology(gpus_per_node=2)).save(plan)
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(8), (400, 4, 1)), axis=2)[:, :, :2]
    RoutingTrace.from_arrays(experts, num_experts=8, sequence=np.arange(400) // 10).save(routing)
    commands = {}
    for word in WORDS:
        text = tmp_path / f"{word}.txt"
        text.write_text(f"{word} and more of it. " * 60)
        generating = f"--prompt {word} --max-new-tokens 12 --ignore-end --nproc 2 --strategy coherent"
        commands["generate", word] = f"generate {model} {generating} --plan {plan} --json"
        commands["profile", word] = f"profile {model} --text {text} -o {tmp_path / word} --json"
        commands["evaluate", word] = f"evaluate {plan} {routing} --json"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    running = {
        key: subprocess.Popen(
            [sys.executable, "-m", "exflow.cli", *command.split()], stdout=-1, stderr=-1, env=environment
        )
        for key, command in commands.items()
    }
    results = {}
    for key, process in running.items():
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        results[key] = json.loads(out)

    tokenizer = Checkpoint.open(model).tokenizer()
    decoder = Checkpoint.open(model).decoder(torch.device("cpu"), torch.float32)
    expected = json.loads(json.dumps(evaluate(Plan.load(plan), RoutingTrace.load(routing))))
    for word in WORDS:
        alone = load_model(model).generate(Request([tokenizer.encode(word).ids], 12))
        assert results["generate", word]["tokens"] == alone.tokens
        text = (tmp_path / f"{word}.txt").read_text()
        windows = windows_of_text(tokenizer, [text], decoder.config.max_positions, 32768)
        assert RoutingTrace.load(tmp_path / word).digest() == profile(decoder, windows, path=None).digest()
        assert expected.items() <= results["evaluate", word].items()  # beside the time of a step
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*WORDS, *(f"{word}.txt" for word in WORDS), "plan.json", "routing", "cache"}
