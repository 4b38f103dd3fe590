"""A job over two hosts: two network namespaces that share nothing but a cable."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exflow.checkpoint import load_tokenizer
from exflow.deploy import load_model
from exflow.engine import Request

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces, 10.77.0.1 and 10.77.0.2, each with one end of the cable, `cable`."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    names = [f"exflow-{os.getpid()}-{host}" for host in range(2)]
    ends = [f"ef{os.getpid() % 100_000}-{host}" for host in range(2)]  # at most 15 characters
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for host, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("link", "set", end, "netns", name, "name", "cable")
            ip("-n", name, "address", "add", f"10.77.0.{host}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_hosts_generate_what_one_process_does(
    hosts: list[str], tiny_checkpoint: Callable[..., Path]
) -> None:
    model, script = tiny_checkpoint(), Path(sys.executable).with_name("exflow")
    if not script.is_file():
        pytest.skip(f"{script} is not installed")
    generate = ["generate", str(model), "--json", "--ignore-end", "--strategy", "node-coherent"]
    generate += ["--prompt", "Rain", "--prompt", "Wind and", "--prompt", "Sun", "--max-new-tokens", "12"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "static", "--master-addr", "10.77.0.1", "--master-port", "29500"]
    agents = [
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                name,
                *torchrun,
                "--node-rank",
                str(host),
                "--no-python",
                script,
                *generate,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"},
        )
        for host, name in enumerate(hosts)
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
    assert result["tokens"] == alone(model, ["Rain", "Wind and", "Sun"], 12)
    assert result["decode"]["dispatch_inter"] > 0
    assert result["decode"]["kv_inter"] == 0  # contexts are shared inside a host
    assert result["decode"]["kv_intra"] > 0


def alone(model: Path, prompts: list[str], new_tokens: int) -> list[list[int]]:
    encodings = load_tokenizer(model).encode_batch(prompts)
    return load_model(model).generate(Request([each.ids for each in encodings], new_tokens)).tokens
