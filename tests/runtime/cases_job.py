"""One rank of a job of many cases, `torchrun ... cases_job.py FOLDER`, on CPUs or GPUs.

Reads FOLDER/job.json, runs each of its cases on the same prompts, and rank 0 writes FOLDER/found.json: the
tokens and the counted traffic of each. With `dies_at` the last rank kills itself in that step.
"""

import json
import os
import signal
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import exflow.runtime.decode_step
from exflow.job.cluster import Cluster, join_cluster
from exflow.job.launch import LOST_CONTACT, LostContact
from exflow.model.checkpoint import Checkpoint
from exflow.model.decoder import Rows
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.runtime.deploy import Deployment, deploy
from exflow.runtime.request import Request


def run_case(job: dict[str, Any], case: dict[str, Any], cluster: Cluster) -> dict[str, Any]:
    deployment = Deployment(
        Checkpoint.open(Path(job["model"])),
        Strategy(case["strategy"]),
        Plan.load(case["plan"]),
        torch.float32,
        case["transport"],
        case["hierarchical"],
    )
    steps = 0

    def observe(rows: Rows, logits_TV: Tensor) -> None:
        nonlocal steps
        steps += 1
        if job["dies_at"] == steps and cluster.rank == cluster.num_ranks - 1:
            torch.cuda.synchronize()
            os.kill(os.getpid(), signal.SIGKILL)

    with closing(deploy(deployment, cluster)) as engine:
        watch = observe if job["dies_at"] else None
        generations = [engine.generate(Request(prompts, job["new"]), watch) for prompts in job["requests"]]
        batches = [captured.shape.sequences for captured in engine.captured]
    return {
        "tokens": [generation.tokens for generation in generations],
        "decode": asdict(generations[-1].decode),
        "batches": batches,
    }


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    if job["dies_at"]:
        exflow.runtime.decode_step.FLAG_TIMEOUT_POLLS = 2_000_000
    torch.set_num_threads(1)
    with join_cluster(job["device"]) as joined:
        cluster = replace(joined, ranks_per_node=joined.num_ranks // job["nodes"])
        found = {case["name"]: run_case(job, case, cluster) for case in job["cases"]}
    if cluster.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except LostContact as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(LOST_CONTACT)  # as the command line does: tidying up would wait for who is gone
