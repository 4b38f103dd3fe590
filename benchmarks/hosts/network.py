"""Hosts on one machine: namespaces joined by cables, of any quality, to a switch. Needs root, and Linux."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CABLE = "cable"  # what every host calls its end
# holds the largest packet that a host passes on: with a smaller bucket tbf cuts packets up, out of order
BURST = "70kb"
QUEUE = "10ms"  # of packets that wait for their turn; what exceeds it is dropped


class NoNetwork(RuntimeError):
    """This machine does not let us make hosts; says why."""


@dataclass(frozen=True)
class Host:
    """A namespace and its address on the switch."""

    name: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `arguments` on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def cut_off(self) -> None:
        """Pull the cable: nothing comes through any more, and nobody is told."""
        _run("ip", "-n", self.name, "link", "set", CABLE, "down")


@contextmanager
def hosts(count: int, rate: str, delay: str | None = None, loss: str | None = None) -> Iterator[list[Host]]:
    """`count` hosts, each on a cable of `rate` (as tc spells it) either way, one-way `delay`, and `loss`.

    They are gone afterwards, however it ends. Raises NoNetwork where namespaces, links or their limits are
    not to be had (delay and loss need the kernel's netem).
    """
    faults = [*(("delay", delay) if delay else ()), *(("loss", loss) if loss else ())]
    if shutil.which("ip") is None or shutil.which("tc") is None or os.geteuid() != 0:
        raise NoNetwork("hosts on one machine need root and the commands ip and tc")
    stem = f"exflow-{os.getpid()}"
    made = [Host(f"{stem}-{number}", f"10.78.0.{number + 1}") for number in range(count)]
    names = [f"{stem}-switch", *(host.name for host in made)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "-n", names[0], "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", names[0], "link", "set", "bridge", "up")
        for number, host in enumerate(made):
            _connect(names[0], f"port{number}", host, rate, faults)
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _connect(switch: str, port: str, host: Host, rate: str, faults: list[str]) -> None:
    """Lay a cable between a port of the switch and the host, limited at both ends: one for each direction."""
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", CABLE, "netns", host.name)
    _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge")
    for name, end in ((switch, port), (host.name, CABLE)):
        limit = ["rate", rate, "burst", BURST, "latency", QUEUE]
        _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", "handle", "1:", "tbf", *limit)
        if faults and end == CABLE:
            _run("tc", "-n", name, "qdisc", "add", "dev", end, "parent", "1:1", "netem", *faults)
        _run("ip", "-n", name, "link", "set", end, "up")
    _run("ip", "-n", host.name, "link", "set", "lo", "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoNetwork(f"{' '.join(command)}: {done.stderr.strip()}")
