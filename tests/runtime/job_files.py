"""Files of a job of many cases: what its ranks read, and what they wrote."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from exflow.model.checkpoint import Checkpoint, save_checkpoint
from exflow.model.decoder import MoE
from exflow.placement.plan.plan import Plan
from exflow.profiling.trace import RoutingTrace
from tests.runtime.distributed_cases import (
    PLAIN,
    REPLICAS,
    Bench,
    Case,
)


@dataclass
class Job:
    """Files that the ranks of a job wrote."""

    folder: Path
    seen: list[dict[str, Any]]
    arrays: list[Any]

    def of(self, case: Case) -> list[dict[str, Any]]:
        """Return what each rank saw of the case."""
        return [seen[case.name] for seen in self.seen]

    def trace(self, case: Case) -> RoutingTrace:
        return RoutingTrace.load(self.folder / f"{case.name}.trace")

    def logits(self, case: Case) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        return [(each[f"{case.name}/places"], each[f"{case.name}/logits"]) for each in self.arrays]


def stored(case: Case, bench: Bench) -> dict[str, Any]:
    return {
        "name": case.name,
        "models": [str(bench.model(case.model))],
        "plan": str(bench.plan(case)),
        "strategy": case.strategy,
        "ranks_per_node": 2,
        "requests": [asdict(each) for each in bench.requests(case.model, case.request)],
        "replay": None if (replay := bench.replay(case)) is None else str(replay),
    }


def read_job(folder: Path, num_ranks: int) -> Job:
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    return Job(folder, seen, [np.load(folder / f"rank-{rank}.npz") for rank in range(num_ranks)])


def damaged_cases(bench: Bench, folder: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Make cases of 4 ranks: NaN in the experts a rank does not host, and one expert NaN for all ranks."""
    cases = []
    for case in (PLAIN, REPLICAS):
        hosts = Plan.load(bench.plan(case)).hosts
        own = [folder / f"{case.placement}-{rank}" for rank in range(4)]
        for rank in range(4):
            damage_experts(bench.model(case.model), own[rank], ~hosts[:, :, rank], tokenizer)
        cases.append(stored(case, bench) | {"name": f"{case.name}-own", "models": [*map(str, own)]})
    one = np.zeros_like(hosts[:, :, 0])
    one[2, 5] = True
    damage_experts(bench.model(PLAIN.model), folder / "one", one, tokenizer)
    cases.append(stored(PLAIN, bench) | {"name": "one-damaged", "models": [str(folder / "one")]})
    return cases


def damage_experts(model: Path, copy: Path, chosen: npt.NDArray[np.bool_], tokenizer: Tokenizer) -> None:
    """A copy of a checkpoint in which the experts chosen [L, E] are NaN."""
    decoder = Checkpoint.open(model).decoder(torch.device("cpu"), torch.float32)
    for module in decoder.modules():
        if isinstance(module, MoE):
            module.experts.w_in[torch.from_numpy(chosen[module.index])] = torch.nan
    save_checkpoint(copy, decoder.config, decoder.state_dict(), tokenizer, torch.float32)
