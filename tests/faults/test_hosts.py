"""Several hosts: one that never comes, a port that is taken, a bad cable, and one that is pulled."""

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.one_process import tokens_of_one_process

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
CABLE = {"GLOO_SOCKET_IFNAME": "cable"}


def torchrun(address: str, port: int, number: int, *more: str) -> list[str]:
    """The start of node `number` of two, of one rank each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "static", "--master-addr", address, "--master-port", str(port)]
    return [*command, "--node-rank", str(number), *more]


def generate(model: Path, *more: str) -> list[str]:
    options = ["--prompt", "Rain", "--prompt", "Wind", "--ignore-end", "--strategy", "coherent"]
    return ["-m", "exflow.cli", "generate", str(model), *options, *more]


@pytest.fixture
def hosts(network: Any) -> Iterator[Callable[..., list[Any]]]:
    """hosts(rate, delay=None, loss=None): two hosts of benchmarks/hosts/network.py."""
    with ExitStack() as stack:

        def make(*quality: str) -> list[Any]:
            try:
                made: list[Any] = stack.enter_context(network.hosts(2, *quality))
            except network.NoNetwork as error:
                pytest.skip(str(error))
            return made

        yield make


@pytest.fixture
def two_hosts(job: Any, model: Path) -> Iterator[Callable[..., list[Any]]]:
    """two_hosts(hosts, *options): a job of `exflow generate` with a rank on each."""
    with ExitStack() as stack:

        def start(hosts: list[Any], *options: str) -> list[Any]:
            run = [torchrun(hosts[0].address, 29500, number) for number in range(2)]
            commands = [
                host.command(*each, *generate(model, *options)) for host, each in zip(hosts, run, strict=True)
            ]
            return [stack.enter_context(job(command, environment=CABLE)) for command in commands]

        yield start


@pytest.mark.all
@pytest.mark.parametrize("quality", [["200kbit"], ["100mbit", "20ms", "2%"]], ids=["slow", "late and lossy"])
def test_a_bad_cable(hosts: Any, two_hosts: Any, model: Path, quality: list[str]) -> None:
    """Lost packets are sent again, and no rank is taken for dead."""
    first, second = two_hosts(hosts(*quality), "--max-new-tokens", "6", "--json", "--patience", "5")
    (code, out, err), (code_of_second, _, _) = first.end(), second.end()
    assert (code, code_of_second) == (0, 0), err
    assert json.loads(out)["tokens"] == tokens_of_one_process(model, ["Rain", "Wind"], 6)


def test_a_pulled_cable(hosts: Any, two_hosts: Any) -> None:
    made = hosts("1gbit")
    jobs = two_hosts(made, "--max-new-tokens", "190000", "--patience", "3")
    for each in jobs:
        each.ranks(1)
    made[1].cut_off()
    began = time.monotonic()
    (code, out, err), (code_of_second, out_of_second, err_of_second) = (each.end() for each in jobs)
    assert time.monotonic() - began < 30
    assert (code, code_of_second, out, out_of_second) == (1, 1, "", "")
    assert "\nexflow: no sign of life from rank 1 of 2 for 3 s in a " in f"\n{err}"
    assert "\nexflow: rank 1: no sign of life from another rank for 3 s in a " in f"\n{err_of_second}"
    torchrun_of_first = f"the first node's torchrun ({made[0].address}:29500)"
    assert f"and no answer from {torchrun_of_first}: this node may be cut off\n" in err_of_second


def test_a_node_that_never_comes(job: Any, model: Path) -> None:
    """Torchrun waits for it, as long as --rdzv-conf says (15 minutes by default)."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    with job(torchrun("localhost", port, 0, "--rdzv-conf", "timeout=2") + generate(model)) as alone:
        code, out, err = alone.end()
    assert (code, out) == (1, "")
    assert "waiting for clients. 1/2 clients joined." in err


def test_a_port_that_is_taken(job: Any, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with job(torchrun("localhost", port, 0) + generate(model)) as first:
            code, out, err = first.end()
    assert (code, out) == (1, "")
    assert f"port: {port}" in err
    assert "EADDRINUSE" in err
