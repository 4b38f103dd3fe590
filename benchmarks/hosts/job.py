"""A multi-node job: what its ranks are told, and torchrun on every host."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hosts.network import CABLE, Host

PORT = "29500"


@dataclass(frozen=True)
class Job:
    """The work of the ranks, stored as job.json for them."""

    batch: int
    steps: int
    repeats: int
    seconds: float
    strategies: list[str]  # replicated, or the ranks of a coherence group
    placements: list[str]
    threads: int  # of a rank
    own_cores: bool  # see `own_cores`


def own_cores(num_ranks: int, threads: int) -> bool:
    """Whether every rank can have `threads` cores, and one more for gloo's thread."""
    return num_ranks * (threads + 1) <= len(os.sched_getaffinity(0))


def run_job(network: list[Host], folder: Path, job: Job) -> None:
    """Run rank.py on every host. Raises RuntimeError if a rank fails or takes far too long."""
    (folder / "job.json").write_text(json.dumps(vars(job)))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": str(job.threads)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(network))]
    torchrun += ["--nproc-per-node", "1", "--rdzv-backend", "static"]
    torchrun += ["--master-addr", network[0].address, "--master-port", PORT]
    program = [str(Path(__file__).with_name("rank.py")), str(folder)]
    with (folder / "errors.txt").open("w") as errors:
        agents = [
            subprocess.Popen(
                host.command(*torchrun, "--node-rank", str(number), *program),
                env=environment,
                stdout=errors,
                stderr=errors,
            )
            for number, host in enumerate(network)
        ]
        try:
            give_up = time.monotonic() + 2 * job.seconds + 240
            codes = [agent.wait(max(1.0, give_up - time.monotonic())) for agent in agents]
        finally:
            for agent in agents:
                agent.terminate()  # torchrun ends its rank, too
            for agent in agents:
                agent.wait(60)
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}:\n{(folder / 'errors.txt').read_text()[-4000:]}")
