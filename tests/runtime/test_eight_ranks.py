"""One, two, four and eight ranks give the same tokens, whatever the strategy, and again when run again."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.sampling import Sampling
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import contiguous_plan, load_model
from exflow.runtime.request import Request

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

RANKS = (2, 4, 8)
STRATEGIES = ("dispatch-combine", "coherent", "replicated", "node-coherent")
PROMPTS = [[1 + (7 * number + place) % 250 for place in range(1 + number % 5)] for number in range(11)]
REQUESTS = {
    "greedy": Request(PROMPTS, 6),
    "sampled": Request(PROMPTS, 6, Sampling(temperature=0.9, top_p=0.95, seed=5)),
}


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., ModelConfig], tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tiny_config(top_k=2))


@pytest.fixture(scope="module")
def jobs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """For each number of ranks what each of them saw of every case; the last case is the first once more."""
    folders = {ranks: tmp_path_factory.mktemp("job") for ranks in RANKS}
    for ranks, folder in folders.items():
        topology = Topology(num_nodes=ranks // 2, gpus_per_node=2)
        contiguous_plan(load_model_config(model), topology).save(folder / "plan.json")
        shared = {"models": [str(model)], "plan": str(folder / "plan.json"), "ranks_per_node": 2}
        cases = [
            {
                "name": f"{strategy} {name}",
                "strategy": strategy,
                "requests": [asdict(request)],
                "replay": None,
            }
            for strategy in STRATEGIES
            for name, request in REQUESTS.items()
            if ranks > 2 or strategy != "node-coherent"
        ]
        cases.append(cases[0] | {"name": "again greedy"})
        (folder / "cases.json").write_text(json.dumps([shared | each for each in cases]))
    worker = [sys.executable, str(Path(__file__).with_name("forked_ranks.py"))]
    arguments = [str(each) for ranks, folder in folders.items() for each in (folder, ranks)]
    done = subprocess.run([*worker, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {
        ranks: [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
        for ranks, folder in folders.items()
    }


@pytest.mark.parametrize("ranks", RANKS)
def test_the_tokens_are_those_of_one_process(jobs: dict[int, list[Any]], model: Path, ranks: int) -> None:
    alone = {name: load_model(model).generate(request).tokens for name, request in REQUESTS.items()}
    assert alone["greedy"] != alone["sampled"]
    assert len(jobs[ranks]) == ranks
    for rank, seen in enumerate(jobs[ranks]):
        assert len(seen) == 2 * (3 if ranks == 2 else 4) + 1
        for name, case in seen.items():
            assert case["generation"]["tokens"] == alone[name.split()[1]], (rank, name)
