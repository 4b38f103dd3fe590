"""A job over two hosts: two network namespaces that share nothing but a cable."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.one_process import tokens_of_one_process

pytestmark = [pytest.mark.all, pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture
def hosts(network: Any) -> Iterator[list[Any]]:
    """Two hosts of benchmarks/hosts/network.py."""
    try:
        with network.hosts(2, "1gbit") as made:
            yield made
    except network.NoNetwork as error:
        pytest.skip(str(error))


def test_two_hosts_generate_what_one_process_does(
    hosts: list[Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    model, script = tiny_checkpoint(), Path(sys.executable).with_name("exflow")
    if not script.is_file():
        pytest.skip(f"{script} is not installed")
    generate = ["generate", str(model), "--json", "--ignore-end", "--strategy", "node-coherent"]
    generate += ["--prompt", "Rain", "--prompt", "Wind and", "--prompt", "Sun", "--max-new-tokens", "12"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "static", "--master-addr", hosts[0].address, "--master-port", "29500"]
    agents = [
        subprocess.Popen(
            host.command(*torchrun, "--node-rank", str(number), "--no-python", str(script), *generate),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"},
        )
        for number, host in enumerate(hosts)
    ]
    try:
        outputs = [agent.communicate(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    result = json.loads(outputs[0][0])
    assert outputs[1][0] == ""  # rank 0 speaks for the job
    assert result["ranks"] == 4
    assert result["tokens"] == tokens_of_one_process(model, ["Rain", "Wind and", "Sun"], 12)
    assert result["decode"]["dispatch_inter"] > 0
    assert result["decode"]["kv_inter"] == 0  # contexts are shared inside a host
    assert result["decode"]["kv_intra"] > 0
