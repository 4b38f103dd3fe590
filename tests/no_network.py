"""Forbids this process, from here on, to look up or reach any host but this one.

The tests run under it, and as `sitecustomize` the processes of the command line do. What was tried is written
down in the file that REACHED names, since a program may go on without it.
"""

import os
import socket
import sys
from typing import Any

CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
OURS = ("", "localhost", "::1", "0.0.0.0", "::", socket.gethostname())


def is_ours(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host or ""
    return name in OURS or name.startswith("127.")


def host_of(event: str, arguments: tuple[Any, ...]) -> str | bytes | None:
    """The host that is asked for, if one is."""
    if event in LOOKUPS:
        host: str | bytes | None = arguments[0]
        return host
    if event in CONNECTIONS and isinstance(arguments[1], tuple):
        return str(arguments[1][0])
    return None


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not is_ours(host_of(event, arguments)):
        if path := os.environ.get("REACHED"):
            with open(path, "a") as file:  # noqa: PTH123 (nothing is imported that the process may not need)
                file.write(f"{event} {arguments} by {sys.argv}\n")
        raise OSError("no network here")


sys.addaudithook(watch)
