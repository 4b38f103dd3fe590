"""`exflow generate` under somebody else's torchrun: two agents stand for two nodes of one rank each."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.one_process import tokens_of_one_process


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["node-coherent", pytest.param("coherent", marks=pytest.mark.all)])
def test_two_nodes_generate_what_one_process_does(
    strategy: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    model = tiny_checkpoint()
    generate = ["-m", "exflow.cli", "generate", str(model), "--json", "--ignore-end"]
    generate += ["--prompt", "Rain", "--prompt", "Wind and", "--prompt", "Sun", "--max-new-tokens", "12"]

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "static", "--master-addr", "localhost", "--master-port", str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(node), *generate, "--strategy", strategy],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    result = json.loads(outputs[0][0])
    assert outputs[1][0] == ""  # rank 0 speaks for the job
    assert result["ranks"] == 2
    assert result["tokens"] == tokens_of_one_process(model, ["Rain", "Wind and", "Sun"], 12)
    assert result["decode"]["dispatch_intra"] == 0  # whatever moved, moved between nodes
    assert result["decode"]["dispatch_inter"] > 0
