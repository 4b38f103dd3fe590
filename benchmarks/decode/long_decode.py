"""Many captured steps under every strategy, against one process: no hang, and no wrong token.

    torchrun --nproc-per-node 2 -m benchmarks.decode.long_decode MODEL [--steps 10000] [-o FILE.json]

Greedy requests in float32, of random prompts, until --steps are done. One process runs the same on the
GPU of rank 0, captured, and the first request eagerly too. Sums in another order differ in their last bits:
where a sequence leaves the path of the one process, it must be at a token between two whose logits are
closer than --tie, and those two; anything else is an error.
"""

import argparse
import json
import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exflow.files import atomic_path
from exflow.job.cluster import Cluster, join_cluster
from exflow.model.checkpoint import Checkpoint
from exflow.model.config_file import load_model_config
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import Deployment, default_plan, deploy, load_model
from exflow.runtime.engine import Engine
from exflow.runtime.request import Request

STRATEGIES = (Strategy.DISPATCH_COMBINE, Strategy.COHERENT, Strategy.REPLICATED)
SEQUENCES = 32
LONGEST_PROMPT = 24


@dataclass(frozen=True)
class Parting:
    """The place where a sequence leaves the one process's path: both tokens, and the gap between their
    logits."""

    request: int
    sequence: int
    position: int
    ours: int
    theirs: int
    margin: float


def requests_of(model: Path, steps: int) -> list[Request]:
    config = load_model_config(model)
    new = config.max_positions - LONGEST_PROMPT
    generator = torch.Generator().manual_seed(0)
    requests = []
    for _ in range(-(-steps // (new - 1))):
        lengths = torch.randint(1, LONGEST_PROMPT + 1, (SEQUENCES,), generator=generator).tolist()
        prompts = [
            torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths
        ]
        requests.append(Request(prompts, new))
    return requests


def partings(
    alone: Engine, requests: list[Request], ours: list[list[list[int]]], theirs: list[list[list[int]]]
) -> list[Parting]:
    """The first difference of each sequence; the margin is by the one process's logits at that place."""
    found = []
    for number, request in enumerate(requests):
        for sequence, (one, other) in enumerate(zip(ours[number], theirs[number], strict=True)):
            place = next(
                (i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None
            )
            if place is not None:
                so_far = [*request.prompts[sequence], *other[:place]]
                margin = abs(_logit(alone, so_far, one[place]) - _logit(alone, so_far, other[place]))
                found.append(Parting(number, sequence, len(so_far), one[place], other[place], margin))
    return found


def _logit(alone: Engine, tokens: list[int], token: int) -> float:
    seen: list[float] = []
    alone.generate(Request([tokens], 1), lambda rows, logits: seen.append(float(logits[0, token])))
    return seen[0]


def run(arguments: argparse.Namespace, cluster: Cluster) -> dict[str, Any]:
    requests = requests_of(arguments.model, arguments.steps)
    config = load_model_config(arguments.model)
    plan = default_plan(config, Topology(gpus_per_node=cluster.num_ranks))
    expected: list[list[list[int]]] = []
    document: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "ranks": cluster.num_ranks}
    if cluster.rank == 0:
        alone = load_model(arguments.model, cluster.device)
        eager = load_model(arguments.model, cluster.device, transport="eager")
        expected = [alone.generate(request).tokens for request in requests]
        first = partings(eager, requests[:1], expected[:1], [eager.generate(requests[0]).tokens])
        document["captured against eager"] = report("one process", first, arguments.tie)
    for strategy in STRATEGIES:
        start = time.perf_counter()
        with closing(deploy(Deployment(Checkpoint.open(arguments.model), strategy, plan), cluster)) as engine:
            ours = [engine.generate(request).tokens for request in requests]
        steps = sum(request.max_new_tokens - 1 for request in requests)
        if cluster.rank == 0:
            taken = f"{strategy}, {steps} steps in {time.perf_counter() - start:.0f} s"
            document[strategy] = report(taken, partings(eager, requests, ours, expected), arguments.tie)
        dist.barrier()
    return document


def report(name: str, found: list[Parting], tie: float) -> dict[str, Any]:
    wrong = [each for each in found if each.margin > tie]
    widest = max((each.margin for each in found), default=0.0)
    print(
        f"{name}: {len(found)} sequences part at a tie of at most {widest:.1e}, {len(wrong)} wrong",
        flush=True,
    )
    return {"partings": [vars(each) for each in found], "wrong": len(wrong)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--tie", type=float, default=1e-3, help="logits as close as this may go either way")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with join_cluster("cuda") as cluster:
        document = run(arguments, cluster)
        wrong = sum(each["wrong"] for each in document.values() if isinstance(each, dict))
        if cluster.rank == 0 and arguments.output:
            with atomic_path(arguments.output) as path:
                path.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
